"""A whole decoder layer."""

from __future__ import annotations

from torch import Tensor

from ..arguments import Grid, Norm, Product, Stage
from .paged import paged_attention
from .pointwise import gated, norm, rotate
from .products import linear, quantized_linear
from .rows import pack_rows


def layer(x: Tensor, stage: Stage) -> Tensor:
    """A decoder layer on single tokens `[tokens, hidden]`, each over the pages of its own request.

    The tokens' keys and values are stored first: the queries see them too.
    """
    layer, seen, turns, heads, _ = stage
    before, query_norm, key_norm, after, before_mlp, after_mlp = layer.norms
    query_product, key_product, value_product, output, gate, up, down = layer.products
    tokens, (kv_heads, key_dim, value_dim) = len(x), seen.shape

    def normed(x: Tensor, how: Norm | None) -> Tensor:
        return x if how is None else norm(x.reshape(*x.shape[:-1], -1, how.width), how).reshape(x.shape)

    def product(x: Tensor, of: Product) -> Tensor:
        quantized = isinstance(of.weight, Grid)
        y = quantized_linear(x, of.weight, of.bias, group=of.group) if quantized else linear(x, of.weight, of.bias)
        return y if of.factor == 1 else y * of.factor

    entry = normed(x, before)
    query = product(entry, query_product)
    if key_product is None or value_product is None:
        query, key, value = query.view(tokens, heads, -1).split([key_dim, key_dim, value_dim], dim=-1)
    else:
        key, value = product(entry, key_product), product(entry, value_product)
    query = rotate(normed(query.reshape(tokens, -1), query_norm).view(tokens, heads, key_dim), turns)
    key = rotate(normed(key.reshape(tokens, -1), key_norm).view(tokens, kv_heads, key_dim), turns)
    value = value.reshape(tokens, kv_heads, value_dim)
    if seen.form is not None:
        key, value = pack_rows(key, seen.form, seen.form.rotates), pack_rows(value, seen.form)
    seen.keys[turns.slots], seen.values[turns.slots] = key, value
    attended = normed(product(paged_attention(query, seen).reshape(tokens, -1), output), after)
    total = x + attended
    read = entry if layer.parallel == 2 else normed(x if layer.parallel else total, before_mlp)
    made = gated(product(read, gate), None if up is None else product(read, up), layer.kind)
    return total + normed(product(made, down), after_mlp)
