"""Walks over a model's modules that every call can afford."""

from __future__ import annotations

from inspect import isfunction
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# Of most attributes of a module; to know them first takes half the time of asking whether they are plain.
HOLDERS = frozenset(
    {dict, type(None), set, list, tuple, type(nn.Module()._parameters), type(nn.Module()._forward_hooks)}
)

# How transformers records hidden states and attentions: the first call that asks for them hooks the layers for good,
# and outside such calls the hooks do nothing.
RECORDS = "transformers.utils.output_capturing"
RECORDED = "_output_capturing_hooks_installed"
SHARDING = "transformers.distributed."  # the modules whose forwards stand in for those of a sharded model
SWITCHED = frozenset({RECORDED, "_active_adapter", "_disable_adapters"})


def modules(model: nn.Module) -> list[nn.Module]:
    """Every module once, parents before their children.

    As `model.modules()`, whose nested generators take several times as long.

    Example:
        >>> from torch import nn
        >>> [type(module).__name__ for module in modules(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))]
        ['Sequential', 'Linear', 'ReLU']
    """
    found, seen = [model], {model}
    for module in found:  # grows meanwhile
        if children := module._modules:  # most have none
            for child in children.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
    return found


def running(model: nn.Module) -> tuple[object, ...]:
    """Which modules there are, their plain attributes, and what runs beside their classes' code.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> before = running(model)
        >>> _ = model[1].register_forward_hook(print)
        >>> before == running(model)
        False
    """
    of_all = (*torch_module._global_forward_hooks, 0, *torch_module._global_forward_pre_hooks)
    return of_all, *map(_mark, modules(model))


def _mark(module: nn.Module) -> tuple[object, ...]:
    named, kind = vars(module), type(module)
    own = named.get("forward")
    if getattr(own, "for_a_pass", False):  # of another model that shares the module, in another thread
        own = None
    if is_adapted(module) or RECORDED in named:  # active adapters are named by `prompt_cache.epoch.settings`
        named = {name: value for name, value in named.items() if name not in SWITCHED}
    plain = [v for v in named.values() if type(v) not in HOLDERS and isinstance(v, (int, float, str))]
    return id(module), kind, kind.forward, own, *forward_hooks(module), 0, *module._forward_pre_hooks, *plain


def forward_hooks(module: nn.Module) -> list[int]:
    """Keys of the hooks behind a module's forward, but for those by which transformers records outputs.

    Example:
        >>> from torch import nn
        >>> module = nn.ReLU()
        >>> handle = module.register_forward_hook(print)
        >>> forward_hooks(module) == [handle.id]
        True
    """
    found = module._forward_hooks
    return [key for key, hook in found.items() if getattr(hook, "__module__", None) != RECORDS] if found else []


def sharded_forward(module: nn.Module) -> Any:
    """What transformers' tensor parallel put in the place of a module's forward; `None` if it put nothing there.

    Example:
        >>> from torch import nn
        >>> sharded_forward(nn.Linear(2, 2)) is None
        True
    """
    own = vars(module).get("forward")
    return own if isfunction(own) and own.__module__.startswith(SHARDING) else None


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT put a layer in."""
    return hasattr(type(module), "_active_adapter")
