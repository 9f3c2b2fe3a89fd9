"""A decoder layer in about ten launches, where transformers' modules need fifty. The twin is `reference.layer`.

Each kernel of another file does what lies between two products or around one. Products of few rows are one launch
where that was measured to be faster than one for each and those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from .few import ROWS, Tile, few
from .gated import gated
from .int_linear import TOGETHER, deep
from .norm import norm
from .rotary import Pages, place
from .tuning import Way, fastest
from .weight import DEEP, bucket_of, wide_ways
from .wide import wide

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Layer, Norm, Product, Shape, Turns

# Tiles that are measured, for one row and for more.
SINGLE = (Tile(4, 1024, 4, 1), Tile(4, 2048, 4, 1), Tile(1, 2048, 4, 1), Tile(4, 512, 4, 1))
SEVERAL = (Tile(64, 128, 4, 4), Tile(64, 256, 4, 4), Tile(64, 128, 4, 6), Tile(16, 128, 4, 6))

JOINT = 256  # rows up to which quantized weights of one launch were faster in every shape

# How the queries read the pages: queries, keys and values `[tokens, heads, width]` to `[tokens, heads * value_dim]`.
Attend = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
Reduce = Callable[["Tensor"], "Tensor"]


def layer(
    x: Tensor,
    layer: Layer,
    heads: int,
    shape: Shape,
    turns: Turns,
    pages: Pages | None,
    attend: Attend,
    reduce: Reduce | None = None,
) -> Tensor:
    """A decoder layer on the tokens of a pass.

    Args:
        x: `[tokens, hidden]`.
        layer: What it computes.
        heads: Of queries.
        shape: Of keys and values.
        turns: The rotary embedding, and the slots.
        pages: Where keys and values are written; `None` if `attend` does that.
        attend: Reads the pages.
        reduce: Sums over the processes that share the layer what the products before the residual give; `None` if this
            one has all of it.

    Returns:
        `[tokens, hidden]`.
    """
    before, query_norm, key_norm, after, before_mlp, after_mlp = layer.norms
    query_product, key_product, value_product, output, gate, up, down = layer.products
    tokens, (kv_heads, key_dim, value_dim) = len(x), shape
    entry = _normed(x, before)
    if key_product is None or value_product is None:
        (joined,) = products(entry, [query_product])
        query, key, value = joined.view(tokens, heads, -1).split([key_dim, key_dim, value_dim], dim=-1)
    else:
        parts = products(entry, [query_product, key_product, value_product])
        if query_norm is not None and query_norm.width != key_dim:  # over all heads
            parts[:2] = _normed(parts[0], query_norm), _normed(parts[1], key_norm)
            query_norm = key_norm = None
        widths = (heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)
        query, key, value = (part.unflatten(1, width) for part, width in zip(parts, widths, strict=True))
    query, key = place(query, key, value, (query_norm, key_norm), turns, pages)
    total = _added(x, attend(query, key, value), output, after, reduce)
    read = entry if layer.parallel == 2 else _normed(x if layer.parallel else total, before_mlp)
    (made,) = products(read, [gate] if up is None else [gate, up], layer.kind)
    return _added(total, made, down, after_mlp, reduce)


def _normed(x: Tensor, how: Norm | None) -> Tensor:
    return x if how is None else norm(x, how)


def _added(total: Tensor, x: Tensor, product: Product, after: Norm | None, reduce: Reduce | None) -> Tensor:
    """The residual with what a product adds to it."""
    if after is None and reduce is None:
        (y,) = products(x, [product], residual=total)
        return y
    (y,) = products(x, [product])
    y = y if reduce is None else reduce(y)
    return total + (y if after is None else norm(y, after))


def products(x: Tensor, of: Sequence[Product], kind: str | None = None, residual: Tensor | None = None) -> list[Tensor]:
    """Products of the same rows in the way that is fastest on this device.

    Args:
        x: `[rows, inputs]`, dense.
        of: The products.
        kind: Gate and up, or a plain MLP's first product, and the activation.
        residual: Added to a single product, or `None`.

    Returns:
        `[rows, outputs]` of each, or what the activation gave.
    """
    apart = partial(_apart, x, of, kind, residual)
    first = of[0].weight
    dense = isinstance(first, torch.Tensor)
    if (dense and len(x) > ROWS) or len(of) > TOGETHER or not _alike(x, of):
        return apart()
    counts = [product.weight.shape[0] for product in of]
    if dense:
        form, bucket = "dense", 1 if len(x) == 1 else ROWS
        ways = [Way("few", tile) for tile in (SINGLE if len(x) == 1 else SEVERAL)]
    else:
        form, bucket = first.form, bucket_of(len(x))
        ways = [Way("deep", tile) for tile in DEEP.get(bucket, ())]
        ways += wide_ways(bucket, sum(counts), x, first.packed())
    if not ways or bucket <= ROWS or bucket > JOINT:
        ways.append(Way("apart"))

    def compute(way: Way) -> list[Tensor]:
        if way.name == "apart":
            return apart()
        if way.name == "few":
            y = few(x, of, kind, residual, Tile(*way.configuration))
        else:
            packed, biases = [product.weight.packed() for product in of], [product.bias for product in of]
            launch = deep if way.name == "deep" else wide
            y = launch(x, packed, biases, way.configuration, kind, residual, of[0].factor)
        return [y] if kind else list(y.split(counts, dim=1))

    way = ways[0]
    if x.is_cuda:  # Triton's interpreter has no clock
        outputs = "+".join(map(str, counts))
        key = f"{form} {outputs}x{x.shape[1]} {x.dtype} {kind} {residual is not None} {bucket}"
        way = fastest(key, ways, compute, x.device) or way
    return compute(way)


def _alike(x: Tensor, of: Sequence[Product]) -> bool:
    """Whether one launch can serve them."""
    first = of[0]
    dense = isinstance(first.weight, torch.Tensor)
    return all(
        isinstance(product.weight, torch.Tensor) == dense
        and (product.weight.dtype == x.dtype and product.weight.is_contiguous() if dense else _joins(product, first))
        and product.factor == first.factor
        and (product.bias is None) == (first.bias is None)
        for product in of
    )


def _joins(product: Product, first: Product) -> bool:
    """Whether a quantized weight is laid out as another one; rounded activations are a kernel of torch's own."""
    weight = product.weight
    return not product.group and "order" not in weight.tensors and weight.form == first.weight.form


def _apart(x: Tensor, of: Sequence[Product], kind: str | None, residual: Tensor | None) -> list[Tensor]:
    """A launch for each product, and one for what follows."""
    made = [_product(x, product) for product in of]
    if kind is not None:
        return [gated(made[0], made[1] if len(made) > 1 else None, kind)]
    return made if residual is None else [residual + made[0]]


def _product(x: Tensor, of: Product) -> Tensor:
    dense = isinstance(of.weight, torch.Tensor)
    y = linear(x, of.weight, of.bias) if dense else of.weight.product(x, of.bias, activations=bool(of.group))
    return y if of.factor == 1 else y * of.factor
