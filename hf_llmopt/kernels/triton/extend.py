"""Attention of spans of any length over pages: prompts, parts of prompts, and prompts behind a cached prefix.

A program computes a tile of query tokens of one request with all query heads that share a key head, so that those read
keys once. It passes the keys in blocks: all tokens of the tile see the blocks in the middle whole, and only those at
the ends, where windows begin and causality ends, are masked. There is no mask tensor, and one launch serves all
requests.

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
    nothing,
    put,
    queries_of,
    rows_of,
    scales_of,
    score,
    slots_of,
    visible,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Seen


class Shape(NamedTuple):
    """How a kernel is tiled.

    Attributes:
        rows: Query rows of a program, a power of two: tokens times the query heads of a key head.
        keys: Keys of a block.
        warps: Of a program.
        stages: Of loading.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _blocks(
    q, total, largest, weight, begin, stop, lowest, highest, table, first, end, tree, head,
    keys, values, key_scales, value_scales, factor, cap,
    KEY_SLOT: tl.constexpr, VALUE_SLOT: tl.constexpr, KEY_SCALES: tl.constexpr, VALUE_SCALES: tl.constexpr,
    PAGE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, TREE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_N)
        seen = (token >= lowest) & (token < highest)
        slots = slots_of(table, token, seen, PAGE, MASKED)
        k = rows_of(keys, slots, seen, KEY_SLOT, KEY_DIM, BLOCK_D, MASKED, DTYPE, FORM)
        k_scales = None
        v_scales = None
        if key_scales is not None:
            k_scales = scales_of(key_scales, slots, seen, KEY_SCALES, head)
            v_scales = scales_of(value_scales, slots, seen, VALUE_SCALES, head)
        s = score(q, k, k_scales, factor, cap, FORM)
        if MASKED:
            s = visible(s, token, first, end, tree, TREE)
        v = rows_of(values, slots, seen, VALUE_SLOT, VALUE_DIM, BLOCK_V, MASKED, DTYPE, FORM)
        total, largest, weight = add(s, v, v_scales, total, largest, weight, FORM)
    return total, largest, weight


@triton.jit
def _extend(
    query, out, keys, values, key_scales, value_scales, table, items, tiles, tree, sinks, factor, cap,
    QUERY_TOKEN, QUERY_HEAD, TILES, PAGES, KEY_HEAD, VALUE_HEAD,
    KEY_SLOT: tl.constexpr, VALUE_SLOT: tl.constexpr, KEY_SCALES: tl.constexpr, VALUE_SCALES: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    TREE: tl.constexpr = tree is not None
    head = tl.program_id(0) // TILES  # programs that read the same keys follow one another
    tile = tl.program_id(0) % TILES
    start = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_M)
    mine = row < count * GROUP
    token = start + row // GROUP
    query_head = head * GROUP + row % GROUP
    first = tl.load(items + token * 3 + 1, mask=mine, other=0)
    end = tl.load(items + token * 3 + 2, mask=mine, other=0)
    branch = None
    if TREE:
        branch = tl.load(tree + token, mask=mine, other=0)
    q = queries_of(query, token, query_head, mine, QUERY_TOKEN, QUERY_HEAD, KEY_DIM, BLOCK_D, DTYPE, FORM)
    total = nothing(BLOCK_M, BLOCK_V, FORM)
    largest = tl.full([BLOCK_M], LEAST, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # a score that has no value
        largest = tl.load(sinks + query_head, mask=mine, other=0).to(tl.float32) * 1.4426950408889634
        weight += 1

    # Of the tile's tokens the first sees least of the end, the last least of the beginning.
    stop = tl.load(items + (start + count - 1) * 3 + 2)
    whole_stop = tl.load(items + start * 3 + 2)
    if TREE:
        whole_stop = tl.maximum(whole_stop - 32, 0)
    lowest = 0
    begin = 0
    whole = 0
    if WINDOWED:  # pages before the window may be somebody else's by now
        lowest = tl.load(items + start * 3 + 1)
        latest = tl.load(items + (start + count - 1) * 3 + 1)
        if TREE:  # nodes are in no order of their depths
            lowest = tl.min(tl.where(mine, first, stop), 0)
            latest = tl.max(first, 0)
        begin = lowest // BLOCK_N * BLOCK_N
        whole = tl.minimum(tl.cdiv(latest, BLOCK_N) * BLOCK_N, stop)
    whole_stop = tl.maximum(whole_stop // BLOCK_N * BLOCK_N, whole)
    pages = table + tl.load(items + start * 3).to(tl.int64) * PAGES
    keys += head.to(tl.int64) * (KEY_DIM if KEY_HEAD is None else KEY_HEAD)
    values += head.to(tl.int64) * (VALUE_DIM if VALUE_HEAD is None else VALUE_HEAD)
    if WINDOWED:
        total, largest, weight = _blocks(
            q, total, largest, weight, begin, whole, lowest, stop, pages, first, end, branch, head,
            keys, values, key_scales, value_scales, factor, cap,
            KEY_SLOT, VALUE_SLOT, KEY_SCALES, VALUE_SCALES,
            PAGE, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, STAGES, True, TREE, DTYPE, FORM,
        )  # fmt: skip
    total, largest, weight = _blocks(
        q, total, largest, weight, whole, whole_stop, lowest, stop, pages, first, end, branch, head,
        keys, values, key_scales, value_scales, factor, cap,
        KEY_SLOT, VALUE_SLOT, KEY_SCALES, VALUE_SCALES,
        PAGE, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, STAGES, False, TREE, DTYPE, FORM,
    )  # fmt: skip
    total, largest, weight = _blocks(
        q, total, largest, weight, whole_stop, stop, lowest, stop, pages, first, end, branch, head,
        keys, values, key_scales, value_scales, factor, cap,
        KEY_SLOT, VALUE_SLOT, KEY_SCALES, VALUE_SCALES,
        PAGE, KEY_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, STAGES, True, TREE, DTYPE, FORM,
    )  # fmt: skip
    place = token.to(tl.int64) * (KV_HEADS * GROUP) + query_head
    put(out, place, total, tl.where(weight > 0, weight, 1)[:, None], mine, VALUE_DIM, BLOCK_V, FORM)


def shape_for(query: Tensor, seen: Seen) -> Shape:
    """A tiling that fits every GPU since Ampere."""
    wide = max(query.shape[2], seen.shape.value_dim)
    group = query.shape[1] // seen.shape.kv_heads
    if query.dtype == torch.float32:
        rows, keys, warps, stages = (32, 32, 4, 1) if wide > 128 else (64, 32, 4, 2)
    elif wide > 128:
        rows, keys, warps, stages = 64, 32, 4, 2
    else:
        rows, keys, warps, stages = 64, 64, 4, 3  # measured on an H100
    return Shape(max(rows, triton.next_power_of_2(group)), keys, warps, stages)


def extend(query: Tensor, seen: Seen, tiles: Tensor, shape: Shape, windowed: bool = True) -> Tensor:
    """Attention of tiles of query tokens over their requests' pages.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What they attend to; its tensors lie on the query's device.
        tiles: Of each program the first token, how many, and the tokens of their request, int32 `[tiles, 3]`. The
            tokens are neighbours, at most `rows / heads per key head`. None: nothing is computed. Those of a request
            follow one another, the last first, which takes longest.
        shape: Of the tiling.
        windowed: Whether any query does not see its request's first token.

    Returns:
        `[tokens, heads, value_dim]`; what no tile names is not written.
    """
    pages, constants = arguments(query, seen)
    out = query.new_empty(*query.shape[:2], seen.shape.value_dim)
    # Heads of pages follow one another, and stay a constant; those of dense keys lie as far apart as there are tokens.
    apart = (None if part.stride(1) == part.shape[2] else part.stride(1) for part in (seen.keys, seen.values))
    _extend[(len(tiles) * seen.shape.kv_heads,)](
        query, out, *pages, tiles,
        seen.tree, seen.sinks, seen.scaling * LOG2E, seen.softcap * LOG2E if seen.softcap else None,
        query.stride(0), query.stride(1), len(tiles), seen.table.shape[1], *apart,
        **constants, BLOCK_M=shape.rows, BLOCK_N=shape.keys,
        STAGES=shape.stages, WINDOWED=windowed, num_warps=shape.warps,
    )  # fmt: skip
    return out
