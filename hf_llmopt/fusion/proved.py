"""What replaces a decoder layer once it has shown, with the arguments of a real pass, that it computes the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.arguments import Layer
from ..kv_cache import LayerSpec
from .structure import Candidate, Structure
from .watch import Compute, prove

LayerForward = Callable[..., Any]


class Proofs(NamedTuple):
    """What is known of a model's layers. Those that differ only in their weights are watched once.

    Attributes:
        specs: What each layer stores.
        structures: Of each signature of layers; `None` where none gave its result. Filled as layers run.
    """

    specs: list[LayerSpec]
    structures: dict[Any, Structure | None]


class Proved:
    """A decoder layer's replacement.

    Args:
        layer: The eager layer.
        found: From `recognise`.
        proofs: Those of the model.
    """

    compute: Compute  # a layer, whatever its structure

    def __init__(self, layer: nn.Module, found: Candidate, proofs: Proofs) -> None:
        self.found = found
        self._layer = weakref.ref(layer)
        self._eager: LayerForward = layer.forward
        self._dtype = next(layer.parameters()).dtype
        self._signature = _signature(layer)
        self._proofs = proofs
        self._bound: Layer | None = None

    @property
    def is_eager(self) -> bool:
        """Whether no structure gave the layer's result."""
        return self._proofs.structures.get(self._signature, False) is None

    def _serves(self, args: tuple[Any, ...], turns: Any) -> bool:
        """Whether a call is one that can be replaced: hidden states `[1, tokens, hidden]` of the layer's format."""
        return (
            len(args) == 1
            and args[0].shape[1] <= self.found.limit
            and args[0].dtype is self._dtype
            and (turns is None or turns[0].dtype in (self._dtype, torch.float32))
        )

    def _structure(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Structure | None:
        specs, structures = self._proofs
        if self._signature not in structures:
            structures[self._signature] = prove(
                self._own(), self.found, hidden_states, specs[self.found.layer], kwargs, type(self).compute
            )
        return structures[self._signature]

    def _own(self) -> nn.Module:
        layer = self._layer()
        assert layer is not None  # it is running
        return layer

    def _bind(self, structure: Structure) -> Layer:
        if self._bound is None:
            self._bound = structure.bind(self._own())
        return self._bound


NUMBERS = {"layer_idx", "_number"}  # attributes that count modules: every layer has its own


def _signature(layer: nn.Module) -> Any:
    """What distinguishes layers besides their weights: classes, plain attributes, shapes."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if key not in NUMBERS and isinstance(value, (int, float, str, bool, type(None)))
            ),
            tuple(p.shape for p in module.parameters(recurse=False)),
        )
        for name, module in layer.named_modules()
    )
