"""What a decoder layer computes, in words of kernels: which modules may be one, how a structure gets parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.arguments import Layer, Turns
from .kinds import Rows, is_library_code, is_plain, norm_of, plain_linear, product_of, quantized_linear

SMALL = 1 << 18  # elements of a weight
FEW = 32  # tokens of a pass up to which products with small weights cost less than calling them
ROTATIONS = ("halves", "neighbours", "repeated", "none")  # see rotary.c


class Candidate(NamedTuple):
    """A module that may be a decoder layer.

    Attributes:
        config: By which a step is found.
        layer: Its index.
        limit: Tokens of a pass up to which C is the faster way.
    """

    config: Any
    layer: int
    limit: int


def recognise(layer: nn.Module, rows: Rows) -> Candidate | None:
    """Whether a module may be a decoder layer of products, norms and activations around one attention."""
    if isinstance(layer, (PreTrainedModel, nn.ModuleList)):
        return None  # a model of one layer
    attentions = [m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "config") and m is not layer]
    if len(attentions) != 1 or not all(map(is_plain, layer.modules())):
        return None
    products = [module for module in layer.modules() if plain_linear(module) or quantized_linear(module)]
    norms = [module for module in layer.modules() if module._parameters and module not in products]
    if not 4 <= len(products) <= 7 or len(norms) > 6 or any(list(norm.children()) for norm in norms):
        return None
    if not all(map(is_library_code, layer.modules())) or getattr(attentions[0].config, "clip_qkv", None) is not None:
        return None  # limits that random input does not reach
    if not all(parameter.is_contiguous() for parameter in layer.parameters()):
        return None
    if len({parameter.dtype for parameter in layer.parameters()}) != 1:
        return None  # norms kept in float32 beside half precision products, say
    # Of small products the calls are what costs, and here is only one.
    sizes = [p.in_features * p.out_features for p in products]  # type: ignore[operator]
    limit = min(max(rows(p), FEW if size < SMALL else 0) for p, size in zip(products, sizes, strict=True))
    index = attentions[0].layer_idx
    return Candidate(attentions[0].config, index, limit) if limit and isinstance(index, int) else None


class Role(NamedTuple):
    """A module of a layer, by name, and which of its rows are meant."""

    name: str
    rows: slice = slice(None)


class Structure(NamedTuple):
    """What every layer of one kind computes, in the order of `Layer`."""

    norms: tuple[str | None, ...]
    products: tuple[Role | None, ...]
    kind: str
    parallel: int
    heads: int
    scaling: float
    softcap: float | None
    factors: tuple[float, float]  # on queries, and on what is added to the residual
    rotation: str = "none"

    def last(self) -> set[str]:
        """Names of the products whose results the residual gets."""
        return {role.name for role in (self.products[3], self.products[6]) if role is not None}

    def bind(self, layer: nn.Module) -> Layer:
        """The structure with a layer's parameters."""
        factors = {0: self.factors[0], 3: self.factors[1], 6: self.factors[1]}
        products = [
            None if role is None else product_of(layer.get_submodule(role.name), role.rows, factors.get(place, 1.0))
            for place, role in enumerate(self.products)
        ]
        norms = [None if name is None else norm_of(layer.get_submodule(name)) for name in self.norms]
        return Layer(tuple(norms), tuple(products), self.kind, self.parallel)  # type: ignore[arg-type]

    def turns(self, slots: Tensor, turns: tuple[Tensor, Tensor] | None) -> Turns:
        """Positions of a pass, whose tokens are in `slots`."""
        if self.rotation == "none" or turns is None:
            return Turns(None, None, slots)
        cosine, sine = (part[0].contiguous() for part in turns)
        return Turns(cosine, sine, slots, ROTATIONS.index(self.rotation))
