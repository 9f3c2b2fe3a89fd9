"""Attention of short spans over pages: decoding, and the verdict on a draft.

A program computes all tokens of a span with all query heads that share a key head, so that one tile reads a key once,
and a part of the span's keys. A second kernel joins the parts by the logarithms of their sums (Dao et al. 2023,
flash-decoding). Lengths, tables and tiles are read on the device and the grid is fixed, so that a CUDA graph replays
the same launch while contexts grow: parts that have no keys return at once.

A program may read the first block of its part while the launch before still runs (see `dependent.py`): what it waits
for is the queries, and the keys and values of their own tokens. Where programs are few, that block is the whole part.

The twin is `reference.paged_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import (
    LEAST,
    LOG2E,
    add,
    arguments,
    block_of,
    multiprocessors,
    nothing,
    put,
    queries_of,
    rows_of,
    scales_of,
    score,
    slots_of,
    visible,
)
from .dependent import early, launch_next, ready
from .extend import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Seen

TOKENS = 16  # the longest span that is decoded
PROGRAMS = 4  # for each multiprocessor
PROGRAMS_AHEAD = 3  # of a single row that reads ahead: more do not fit, since what they have read takes registers
PARTS = 128  # of a span's keys, at most
SMALL = 2**24  # numbers that a launch reads: where it reads more, it begins when the one ahead has ended
LEAST_KEYS = 64  # of a part: fewer cost more to join than they save
# Parts of one block that are read ahead, where the product before has one row, and several: keys, warps, and programs
# for each multiprocessor at most. Its programs of one row begin early and leave less room.
AHEAD_ONE = ((128, 4, 2),)
AHEAD = (128, 4, 1), (256, 8, 1)


class Plan(NamedTuple):
    """How a launch is tiled.

    Attributes:
        shape: Of the tiling.
        split: Parts that a span's keys are split into, at most.
        ahead: Whether the first block of a part is read ahead; not for pages of another format.
    """

    shape: Shape
    split: int
    ahead: bool = False


@triton.jit
def _range(items, start, count, SPLIT: tl.constexpr, LEAST_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key, block of that key, end of the keys, and blocks of a part, of a tile's tokens."""
    lowest = tl.load(items + start * 3 + 1)
    begin = lowest // BLOCK_N
    stop = tl.load(items + (start + count - 1) * 3 + 2)
    each = tl.maximum(tl.cdiv(tl.cdiv(stop, BLOCK_N) - begin, SPLIT), LEAST_BLOCKS)
    return lowest, begin, stop, each


@triton.jit
def _completed(rows, pages, slots, new, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows as from `rows_of`, with those that are new."""
    d = tl.arange(0, BLOCK_D)[None, :]
    places = pages + slots[:, None] * stride + d
    rest = rows.to(pages.dtype.element_ty)
    return tl.load(places, mask=new[:, None] & (d < DIM), other=rest).to(rows.dtype)


@triton.jit
def _decode(
    query, out, sums, keys, values, key_scales, value_scales, table, items, tiles, tree, sinks, factor, cap,
    QUERY_TOKEN, QUERY_HEAD, PAGES,
    KEY_SLOT: tl.constexpr, VALUE_SLOT: tl.constexpr, KEY_SCALES: tl.constexpr, VALUE_SCALES: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, LEAST_BLOCKS: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    launch_next(EARLY and not AHEAD)
    head = tl.program_id(0)
    part = tl.program_id(1)
    tile = tl.program_id(2)
    start = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    if count == 0:
        return
    lowest, begin, stop, each = _range(items, start, count, SPLIT, LEAST_BLOCKS, BLOCK_N)
    low = (begin + part * each) * BLOCK_N
    if (part > 0) & (low >= stop):
        return
    high = tl.minimum(low + each * BLOCK_N, stop)
    row = tl.arange(0, BLOCK_M)
    mine = row < count * GROUP
    token = start + row // GROUP
    query_head = head * GROUP + row % GROUP
    first = tl.load(items + token * 3 + 1, mask=mine, other=0)
    end = tl.load(items + token * 3 + 2, mask=mine, other=0)
    branch = None
    if tree is not None:
        branch = tl.load(tree + token, mask=mine, other=0)
    pages = table + tl.load(items + start * 3).to(tl.int64) * PAGES
    keys += head * KEY_DIM
    values += head * VALUE_DIM
    if AHEAD:
        place = low + tl.arange(0, BLOCK_N)
        seen = (place >= lowest) & (place < high)
        old = seen & (place < stop - count)  # an earlier pass wrote them
        slots = slots_of(pages, place, seen, PAGE, True)
        k = rows_of(keys, slots, old, KEY_SLOT, KEY_DIM, BLOCK_D, True, DTYPE, FORM)
        v = rows_of(values, slots, old, VALUE_SLOT, VALUE_DIM, BLOCK_V, True, DTYPE, FORM)
    ready(EARLY)
    launch_next(EARLY and AHEAD)
    q = queries_of(query, token, query_head, mine, QUERY_TOKEN, QUERY_HEAD, KEY_DIM, BLOCK_D, DTYPE, FORM)
    total = nothing(BLOCK_M, BLOCK_V, FORM)
    largest = tl.full([BLOCK_M], LEAST, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None and part == 0:  # a score that has no value
        largest = tl.load(sinks + query_head, mask=mine, other=0).to(tl.float32) * 1.4426950408889634
        weight += 1
    if AHEAD:
        new = seen & (place >= stop - count)
        k = _completed(k, keys, slots, new, KEY_SLOT, KEY_DIM, BLOCK_D)
        v = _completed(v, values, slots, new, VALUE_SLOT, VALUE_DIM, BLOCK_V)
        s = visible(score(q, k, None, factor, cap, FORM), place, first, end, branch, tree is not None)
        total, largest, weight = add(s, v, None, total, largest, weight, FORM)
        low += BLOCK_N
    for key in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        place = key + tl.arange(0, BLOCK_N)
        seen = (place >= lowest) & (place < high)  # pages before the window may be somebody else's by now
        slots = slots_of(pages, place, seen, PAGE, True)
        k = rows_of(keys, slots, seen, KEY_SLOT, KEY_DIM, BLOCK_D, True, DTYPE, FORM)
        k_scales = None
        v_scales = None
        if key_scales is not None:
            k_scales = scales_of(key_scales, slots, seen, KEY_SCALES, head)
            v_scales = scales_of(value_scales, slots, seen, VALUE_SCALES, head)
        s = visible(score(q, k, k_scales, factor, cap, FORM), place, first, end, branch, tree is not None)
        v = rows_of(values, slots, seen, VALUE_SLOT, VALUE_DIM, BLOCK_V, True, DTYPE, FORM)
        total, largest, weight = add(s, v, v_scales, total, largest, weight, FORM)
    place = (token.to(tl.int64) * (KV_HEADS * GROUP) + query_head) * SPLIT + part
    if SPLIT == 1:
        weight = tl.where(weight > 0, weight, 1)
    else:
        tl.store(sums + place * 2, largest, mask=mine)
        tl.store(sums + place * 2 + 1, weight, mask=mine)
        weight = tl.full([BLOCK_M], 1, tl.float32)
    put(out, place, total, weight[:, None], mine, VALUE_DIM, BLOCK_V, FORM)


@triton.jit
def _join(
    parts, sums, out, items, tiles,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, LEAST_BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    launch_next(EARLY)
    head = tl.program_id(0)
    start = tl.load(tiles + tl.program_id(2) * 3)
    count = tl.load(tiles + tl.program_id(2) * 3 + 1)
    if tl.program_id(1) >= count:
        return
    _lowest, begin, stop, each = _range(items, start, count, SPLIT, LEAST_BLOCKS, BLOCK_N)
    row = (start + tl.program_id(1)).to(tl.int64) * HEADS + head
    part = tl.arange(0, BLOCK_S)
    filled = (part == 0) | ((part < SPLIT) & ((begin + part * each) * BLOCK_N < stop))
    place = row * SPLIT + part
    v = tl.arange(0, BLOCK_V)
    inside = filled[:, None] & (v < VALUE_DIM)[None, :]
    ready(EARLY)
    # Asked for first: they are on their way while the sums are added.
    total = tl.load(parts + place[:, None] * VALUE_DIM + v[None, :], mask=inside, other=0.0)
    largest = tl.load(sums + place * 2, mask=filled, other=LEAST)
    weight = tl.load(sums + place * 2 + 1, mask=filled, other=0.0)
    factor = tl.exp2(largest - tl.max(largest, 0))
    weight = tl.sum(weight * factor, 0)
    total = tl.sum(total * factor[:, None], 0) / tl.where(weight > 0, weight, 1)
    tl.store(out + row * VALUE_DIM + v, total.to(out.dtype.element_ty), mask=v < VALUE_DIM)


def shape_for(query: Tensor, seen: Seen, tokens: int) -> Shape:
    """A tiling that fits every GPU since Ampere.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What they attend to.
        tokens: Of the longest span.
    """
    wide = max(query.shape[2], seen.shape.value_dim)
    rows = max(16, triton.next_power_of_2(tokens * query.shape[1] // seen.shape.kv_heads))
    if query.dtype == torch.float32 or wide > 128 or rows > 64:
        return Shape(rows, 32, 4 if rows <= 64 else 8, 3)
    if seen.form is not None and seen.form.bits == 4:  # a block of keys is four times as small
        return Shape(rows, 128 if rows == 16 else 64, 4, 5)
    if seen.form is not None or rows == 32:
        return Shape(rows, 32, 4, 4)
    return Shape(rows, 64, 4, 2 if rows == 16 else 3)


def plan(query: Tensor, seen: Seen, spans: int, tokens: int) -> Plan:
    """A tiling, and parts of the keys that fill the device.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What they attend to.
        spans: Tiles of a launch.
        tokens: Of the longest span.
    """
    shape = shape_for(query, seen, tokens)
    programs, ahead, single = PROGRAMS, False, len(query) == 1
    if shape == Shape(16, 64, 4, 2) and early(query.device)["EARLY"]:
        for keys, warps, most in AHEAD_ONE if single else AHEAD:
            split = -(-seen.longest // keys)
            if spans * seen.shape.kv_heads * split <= most * multiprocessors(query.device):
                return Plan(Shape(16, keys, warps, 1), split, True)
        if single:
            shape, programs, ahead = Shape(16, 64, 4, 3), PROGRAMS_AHEAD, True
    programs = programs * multiprocessors(query.device) // (spans * seen.shape.kv_heads)
    return Plan(shape, max(1, min(programs, -(-seen.longest // max(LEAST_KEYS, shape.keys)), PARTS)), ahead)


def decode(query: Tensor, seen: Seen, tiles: Tensor, tokens: int, plan: Plan) -> Tensor:
    """Attention of short spans over their requests' pages.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What they attend to; its tensors lie on the query's device.
        tiles: Of each span the first token, how many, and its request's, int32 `[spans, 3]`; as for `extend.extend`.
        tokens: Of the longest span, at most TOKENS; with the query heads of a key head at most `plan.shape.rows`.
        plan: How the launch is tiled.

    Returns:
        `[tokens, heads, value_dim]`; what no tile names is not written.
    """
    shape, split, ahead = plan
    kv_heads, key_dim, value_dim = seen.shape
    heads = query.shape[1]
    least = -(-LEAST_KEYS // shape.keys)
    small = len(tiles) * seen.longest * kv_heads * (key_dim + value_dim) <= SMALL
    pages, constants = arguments(query, seen)
    out = query.new_empty(len(query), heads, value_dim)
    parts, sums = out, None
    if split > 1:
        parts = query.new_empty(len(query), heads, split, value_dim, dtype=torch.float32)
        sums = query.new_empty(len(query), heads, split, 2, dtype=torch.float32)
    _decode[(kv_heads, split, len(tiles))](
        query, parts, sums, *pages, tiles,
        seen.tree, seen.sinks, seen.scaling * LOG2E, seen.softcap * LOG2E if seen.softcap else None,
        query.stride(0), query.stride(1), seen.table.shape[1],
        **constants, BLOCK_M=shape.rows, BLOCK_N=shape.keys,
        SPLIT=split, LEAST_BLOCKS=least, STAGES=shape.stages, num_warps=shape.warps,
        AHEAD=ahead, **(early(query.device) if small or ahead else {"EARLY": False}),
    )  # fmt: skip
    if split > 1:
        _join[(heads, tokens, len(tiles))](
            parts, sums, out, seen.items, tiles, HEADS=heads, VALUE_DIM=value_dim, BLOCK_N=shape.keys,
            BLOCK_V=block_of(value_dim), SPLIT=split, BLOCK_S=triton.next_power_of_2(split), LEAST_BLOCKS=least,
            num_warps=4, **early(query.device),
        )  # fmt: skip
    return out
