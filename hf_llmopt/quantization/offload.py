"""Modules whose weights accelerate keeps elsewhere, brought to their device for a while."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import set_module_tensor_to_device
from accelerate.utils.modeling import named_module_tensors
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn
from transformers.integrations.accelerate import offload_weight


@contextmanager
def resident(module: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[None]:
    """Keep what accelerate offloads of a module on its device for a while.

    Parameters that got other data meanwhile are stored, but for the weights of the modules in `without`: they would
    fill the memory that offloading saves.
    """
    loaded: list[tuple[nn.Module, AlignDevicesHook, str, int]] = []
    hooks: list[AlignDevicesHook] = []
    for child in module.modules():
        own = getattr(child, "_hf_hook", None)
        for hook in getattr(own, "hooks", (own,)):
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                hooks.append(hook)
                for name, _ in _offloaded(child, hook):
                    set_module_tensor_to_device(child, name, hook.execution_device, value=hook.weights_map[name])
                    loaded.append((child, hook, name, operator.attrgetter(name)(child).data_ptr()))
                hook.offload = False
    try:
        yield
    finally:
        for child, hook, name, address in loaded:
            tensor = operator.attrgetter(name)(child)
            if tensor.data_ptr() != address and not (name == "weight" and child in without):
                _store(hook.weights_map, name, tensor)
            set_module_tensor_to_device(child, name, "meta")
        for hook in hooks:
            hook.offload = True


def rewrite(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change a parameter that accelerate keeps on disk: what it loads from now on is a file in the offload folder."""
    own: Any = module._hf_hook
    weights = next(hook.weights_map for hook in getattr(own, "hooks", (own,)) if getattr(hook, "offload", False))
    held, everything = weights[name], weights.dataset
    changed = change(held)
    if changed is not held:
        offload_weight(changed, f"{weights.prefix}{name}", everything.save_folder, everything.index)
    setattr(module, name, nn.Parameter(changed.to("meta"), requires_grad=False))  # what is loaded is cast to its type


def _offloaded(module: nn.Module, hook: AlignDevicesHook) -> list[tuple[str, Tensor]]:
    """What an offloading hook loads before its module runs."""
    return list(
        named_module_tensors(
            module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
        )
    )


def _store(weights: Any, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place that accelerate loads it from; in memory, where that was a file."""
    if isinstance(weights, PrefixedDataset):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    if isinstance(weights, OffloadedWeightsLoader):
        weights = weights.state_dict
    weights[name] = tensor.detach().cpu()
