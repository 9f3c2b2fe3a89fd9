"""PEFT's LoRA layers in a pass whose requests name different adapters.

A LoRA layer adds `scaling * B(A(x))` to what its base layer gives (Hu et al. 2021, arXiv:2106.09685). For
the time of a mixed pass its `forward` runs the base layer over all tokens, and each adapter over the tokens of the
requests that named it. A request that names none gets what `generate` would give it: the model's active adapters.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidRequest
from ..fusion import Replacement

BASE = "__base__"  # PEFT's word for no adapter at all

Share = tuple["str | None", Tensor]  # an adapter's name, and its tokens' places in the pass, [tokens]


class _Pass(threading.local):
    """The pass that this thread runs: a plain forward in another thread must not meet it.

    Attributes:
        shares: By the number of rows a layer is given (all tokens of the pass, or those whose logits are wanted), which
            adapter each row belongs to.
    """

    shares: dict[int, list[Share]] | None = None


_pass = _Pass()


def check(model: nn.Module, name: str) -> None:
    """Refuse an adapter that requests cannot be given one by one.

    Args:
        model: The model.
        name: As `load_adapter` or `add_adapter` named it, or `"__base__"` for none.

    Raises:
        InvalidRequest: The model has no such adapter, or it is more than LoRA's two products beside a linear layer.
    """
    _check(_adapted(model), name)


def _check(layers: Sequence[tuple[str, Any]], name: str) -> None:
    known = sorted({key for _, layer in layers for key in _names(layer)})
    if name != BASE and name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        allowed = ", ".join(map(repr, known)) or "none; model.load_adapter(path, adapter_name=...) adds one"
        raise InvalidRequest(f"adapter {name!r} does not exist.{hint} The model has: {allowed}.")
    for path, layer in layers:
        reason = _reason_against(layer, name)
        if reason is not None:
            raise InvalidRequest(
                f"adapter={name!r} cannot be chosen for one request: {path} {reason}. Requests that name no adapter "
                "use what model.set_adapter made active."
            )


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Every module of PEFT's that may change what its base layer gives, with its path."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def _names(layer: Any) -> set[str]:
    """The adapters that a layer knows."""
    return set(layer._get_available_adapters())


def _reason_against(layer: Any, name: str) -> str | None:
    """Why rows of this layer's input cannot go through `name` apart from others, or `None`."""
    from peft.tuners.lora import Linear

    if getattr(layer, "merged_adapters", ()):
        return f"has {', '.join(map(repr, layer.merged_adapters))} merged into its weight; unmerge it"
    if type(layer) is not Linear:
        concerned = _names(layer) & {name, *_active(layer)}
        return f"is a {type(layer).__name__}, not a LoRA of a linear layer" if concerned else None
    for used in (name, *_active(layer)):
        if used in layer.lora_variant:
            return f"is a variant of LoRA ({type(layer.lora_variant[used]).__name__})"
    replaced = vars(layer).get("forward")  # ours, if another thread runs a pass now
    if not (replaced is None or isinstance(replaced, Replacement)) or layer._forward_pre_hooks or layer._forward_hooks:
        return "carries a hook or a forward of its own"
    return None


class LoraLayers:
    """The LoRA layers of a model."""

    def __init__(self) -> None:
        self._layers: list[tuple[str, Any]] = []

    def refresh(self, model: nn.Module) -> None:
        """Look for the layers again: adapters may have been added since."""
        self._layers = _adapted(model)

    @contextmanager
    def entered(self, names: Sequence[str | None], kept: Sequence[int], device: torch.device) -> Iterator[None]:
        """Let every layer treat each token by its own adapter inside the block.

        Args:
            names: The adapter of each token of the pass, `None` for the model's active ones.
            kept: Places of the tokens whose logits are wanted.
            device: Where the pass runs.

        Raises:
            InvalidRequest: An adapter is gone, or can no longer be mixed with others.
        """
        for name in {name for name in names if name is not None}:
            _check(self._layers, name)
        entered = [layer for _, layer in self._layers if hasattr(layer, "lora_A")]
        try:
            # The output layer may be given the kept tokens alone.
            _pass.shares = {len(kept): _shares([names[place] for place in kept], device)}
            _pass.shares[len(names)] = _shares(names, device)
            for layer in entered:
                layer.__dict__["forward"] = Replacement(layer, _mixed(layer))
            yield
        finally:
            _pass.shares = None
            for layer in entered:
                layer.__dict__.pop("forward", None)


def _shares(names: Sequence[str | None], device: torch.device) -> list[Share]:
    places: dict[str | None, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return [(name, torch.tensor(own, device=device)) for name, own in places.items()]


def _mixed(layer: Any) -> Callable[..., Tensor]:
    """A forward of `layer` that gives each row `[..., inputs]` its own adapter."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _pass.shares is None:
            return type(layer).forward(layer, x, *args, **kwargs)
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        rows, out = x.flatten(0, -2), result.flatten(0, -2)
        for name, places in _pass.shares[len(rows)]:
            chosen = _active(layer) if name is None else [name]
            found = [adapter for adapter in chosen if adapter in layer.lora_A]
            if found:
                places = places.to(rows.device)
                own = _added(layer, found, rows[places], out[places])
                out = out.index_copy(0, places, own)
        return out.view(result.shape)

    return forward


def _active(layer: Any) -> Sequence[str]:
    return () if layer.disable_adapters else layer.active_adapters


def _added(layer: Any, names: Sequence[str], x: Tensor, base: Tensor) -> Tensor:
    """What the layer gives for rows `x` that go through these adapters, in PEFT's order of operations."""
    total = base
    for name in names:
        first, second = layer.lora_A[name], layer.lora_B[name]
        x = x.to(first.weight.dtype)
        total = total + second(first(layer.lora_dropout[name](x))) * layer.scaling[name]
    return total.to(base.dtype)
