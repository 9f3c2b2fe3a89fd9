"""Norms of heads, the rotary embedding, and keys and values on their way into pages: a program for each head.

The twin is `reference.norm`, `reference.rotate` and a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from .dependent import early, launch_next, ready
from .norm import normalized

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Norm, Turns


@triton.jit
def _turned(
    x, cosine, sine, weight, bias, epsilon, token, ROTATED: tl.constexpr, PAIRS: tl.constexpr, EXACT: tl.constexpr,
    NORM: tl.constexpr, CENTRE: tl.constexpr, VARIANT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A head in float32, rounded where the model rounds; `x` is its address."""
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    y = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        wide = y
        y = normalized(wide, weight, bias, d, inside, epsilon, WIDTH, CENTRE, VARIANT, DTYPE).to(DTYPE).to(tl.float32)
    if ROTATED > 0:
        turns = d < ROTATED
        if PAIRS == 0:
            other = tl.where(d < ROTATED // 2, d + ROTATED // 2, d - ROTATED // 2)
            first = d < ROTATED // 2
        else:
            other = d ^ 1
            first = d % 2 == 0
        other = tl.where(turns, other, d)
        z = tl.load(x + other, mask=inside, other=0.0).to(tl.float32)
        if NORM:  # of the same numbers in another order: the same mean square
            z = normalized(z, weight, bias, other, inside, epsilon, WIDTH, CENTRE, VARIANT, DTYPE)
            z = z.to(DTYPE).to(tl.float32)
        angle = token * ROTATED + (d // 2 if PAIRS == 2 else d)
        a = y * tl.load(cosine + angle, mask=turns, other=1.0).to(tl.float32)
        b = tl.where(first, -z, z) * tl.load(sine + angle, mask=turns, other=0.0).to(tl.float32)
        if not EXACT:
            a = a.to(DTYPE).to(tl.float32)
            b = b.to(DTYPE).to(tl.float32)
        y = tl.where(turns, a + b, y)
    return y


@triton.jit
def _place(
    query, key, value, new_query, new_key, keys, values, slots, cosine, sine,
    query_weight, query_bias, query_epsilon, key_weight, key_bias, key_epsilon,
    QUERY_TOKEN, QUERY_HEAD, KEY_TOKEN, KEY_HEAD, VALUE_TOKEN, VALUE_HEAD, KEY_SLOT, VALUE_SLOT,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTATED: tl.constexpr, PAIRS: tl.constexpr, EXACT: tl.constexpr,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, CENTRE: tl.constexpr, VARIANT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    launch_next(EARLY)
    ready(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dtype = new_query.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    if head < HEADS:
        turned = _turned(
            query + token * QUERY_TOKEN + head * QUERY_HEAD, cosine, sine, query_weight, query_bias, query_epsilon,
            token, ROTATED, PAIRS, EXACT, QUERY_NORM, CENTRE, VARIANT, KEY_DIM, BLOCK_D, dtype,
        ).to(dtype)  # fmt: skip
        tl.store(new_query + (token * HEADS + head) * KEY_DIM + d, turned, mask=d < KEY_DIM)
    elif head < HEADS + KV_HEADS:
        own = head - HEADS
        turned = _turned(
            key + token * KEY_TOKEN + own * KEY_HEAD, cosine, sine, key_weight, key_bias, key_epsilon,
            token, ROTATED, PAIRS, EXACT, KEY_NORM, CENTRE, VARIANT, KEY_DIM, BLOCK_D, dtype,
        ).to(dtype)  # fmt: skip
        tl.store(new_key + (token * KV_HEADS + own) * KEY_DIM + d, turned, mask=d < KEY_DIM)
        if keys is not None:
            tl.store(keys + tl.load(slots + token) * KEY_SLOT + own * KEY_DIM + d, turned, mask=d < KEY_DIM)
    elif values is not None:
        own = head - HEADS - KV_HEADS
        v = tl.arange(0, BLOCK_V)
        given = tl.load(value + token * VALUE_TOKEN + own * VALUE_HEAD + v, mask=v < VALUE_DIM, other=0.0)
        tl.store(values + tl.load(slots + token) * VALUE_SLOT + own * VALUE_DIM + v, given, mask=v < VALUE_DIM)


class Pages(NamedTuple):
    """Where keys and values go.

    Attributes:
        keys: All slots of a layer, `[slots, kv_heads, key_dim]`.
        values: `[slots, kv_heads, value_dim]`.
    """

    keys: Tensor
    values: Tensor


def place(
    query: Tensor, key: Tensor, value: Tensor, norms: tuple[Norm | None, Norm | None], turns: Turns, pages: Pages | None
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions; write keys and values into their slots.

    Args:
        query: `[tokens, heads, key_dim]`, the last axis dense.
        key: `[tokens, kv_heads, key_dim]`, likewise.
        value: `[tokens, kv_heads, value_dim]`, likewise.
        norms: Of queries and keys, each as wide as a head, and alike but for their weights.
        turns: The rotary embedding, and the slots.
        pages: `None` where they hold something else than these numbers.

    Returns:
        Queries and keys, dense.
    """
    (tokens, heads, key_dim), (_, kv_heads, value_dim) = query.shape, value.shape
    new_query, new_key = query.new_empty(query.shape), key.new_empty(key.shape)
    how = norms[0] or norms[1]
    of = [(None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.epsilon) for norm in norms]
    rotated = 0 if turns.cosine is None else turns.cosine.shape[-1]
    slot = (0, 0) if pages is None else (pages.keys.stride(0), pages.values.stride(0))
    block = triton.next_power_of_2(key_dim)
    _place[(tokens, heads + kv_heads * (1 if pages is None else 2))](
        query, key, value, new_query, new_key, *(pages or (None, None)), turns.slots, turns.cosine, turns.sine,
        *of[0], *of[1], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *slot,
        heads, kv_heads, key_dim, value_dim, rotated, turns.pairs,
        turns.cosine is not None and turns.cosine.dtype != query.dtype,
        norms[0] is not None, norms[1] is not None, how is not None and how.centre, 0 if how is None else how.variant,
        block, triton.next_power_of_2(value_dim), num_warps=1, **early(query.device),
    )  # fmt: skip
    return new_query, new_key
