"""Attention of long spans over pages on Hopper, in Gluon: what `extend.py` computes, with the chip's own instructions.

One warp fetches blocks of keys and values by the copy engine, two groups of four warps multiply, 64 rows each. A group
puts the next block's scores and the last block's values on the tensor cores, and computes exponentials meanwhile (Shah
et al. 2024, FlashAttention-3). Blocks are passed from the last to the first: masked ones first, then a
loop without masks.

A block must lie in neighbouring slots. The twin is `reference.paged_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .blocks import LOG2E

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Seen

ROWS = 128  # query rows of a program
KEYS = 128  # of a block
STAGES = 2  # blocks that are fetched ahead
WIDTHS = (64, 128)
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # Triton before 3.7


@gluon.jit
def _fetch(
    keys, values, k, v, k_full, k_free, v_full, v_free, table, head, last, blocks,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
):  # fmt: skip
    for i in range(blocks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        token = (last - i) * BLOCK_N
        slot = gl.load(table + token // PAGE) * PAGE + token % PAGE
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), BLOCK_N * KEY_DIM * 2)
        fetch(keys, [slot, head * KEY_DIM], k_full.index(stage), k.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BLOCK_N * VALUE_DIM * 2)
        fetch(values, [slot, head * VALUE_DIM], v_full.index(stage), v.index(stage))


@gluon.jit
def _softmax(s, token, first, end, largest, weight, factor, cap, MASKED: gl.constexpr):
    """Weights of a block, by how much less earlier ones count, the largest score so far and the sum of weights."""
    if cap is not None:
        s = cap * (1 - 2 / (gl.exp2(s * (factor * 2.8853900817779268 / cap)) + 1))
        factor = 1.0
    if MASKED:
        sees = (token[None, :] >= first[:, None]) & (token[None, :] < end[:, None])
        s = gl.where(sees, s, float("-inf"))
    now = gl.maximum(largest, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - now[:, None])
    less = gl.exp2(largest - now)
    return p, less, now, weight * less + gl.sum(p, 1)


@gluon.jit
def _blocks(
    low, high, last, q, k, v, k_full, k_free, v_full, v_free, p, total, largest, weight, first, end, factor, cap,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Blocks `high` to `low`, both counted from the first; `p` holds the weights of the block before."""
    for block in range(high, low - 1, -1):
        i = last - block
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
        s = warpgroup_mma(q, k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        total = warpgroup_mma(p, v.index(before), total, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_free.index(stage))
        token = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        now, less, largest, weight = _softmax(s, token, first, end, largest, weight, factor, cap, MASKED)
        total, p = warpgroup_mma_wait(0, deps=[total, p])
        mbarrier.arrive(v_free.index(before))
        total = total * gl.convert_layout(less, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(now.to(p.dtype), p.type.layout)
    return p, total, largest, weight


@gluon.jit
def _consume(
    part: gl.constexpr, query, out, k, v, k_full, k_free, v_full, v_free, items, sinks, factor, cap,
    QUERY_TOKEN, QUERY_HEAD, start, count, head, context, last, blocks, whole_low, whole_high, q,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // KEY_DIM, KEY_DIM // 8], [4, 1], [1, 0])
    row = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, LOADS))
    token = start + row // GROUP
    d = gl.arange(0, KEY_DIM, gl.SliceLayout(0, LOADS))
    places = query + token.to(gl.int64)[:, None] * QUERY_TOKEN
    places += ((head * GROUP + row % GROUP) * QUERY_HEAD)[:, None] + d[None, :]
    q.store(gl.load(places, mask=(row < count * GROUP)[:, None], other=0.0))
    fence_async_shared()

    row = part * 64 + gl.arange(0, 64, ROWS)
    mine = row < count * GROUP
    token = start + row // GROUP
    first = gl.load(items + token * 3 + 1, mask=mine, other=0)
    end = gl.load(items + token * 3 + 2, mask=mine, other=0)
    largest = gl.full([64], -1e30, gl.float32, ROWS)
    weight = gl.zeros([64], gl.float32, ROWS)
    if sinks is not None:
        largest = gl.load(sinks + head * GROUP + row % GROUP, mask=mine, other=0).to(gl.float32) * 1.4426950408889634
        weight += 1
    total = gl.zeros([64, VALUE_DIM], gl.float32, OUT)

    # The last block, whose values nobody may take from what lies behind the request's last token.
    mbarrier.wait(k_full.index(0), 0)
    zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    s = warpgroup_mma(q, k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    key = last * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    now, _less, largest, weight = _softmax(s, key, first, end, largest, weight, factor, cap, True)
    p = gl.convert_layout(now.to(DTYPE), P)
    mbarrier.wait(v_full.index(0), 0)
    if (last + 1) * BLOCK_N > context:
        VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0])
        own = last * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, VALUES)) < context
        found = v.index(0).load(VALUES)
        v.index(0).store(gl.where(own[:, None], found, gl.zeros_like(found)))
        fence_async_shared()

    p, total, largest, weight = _blocks(
        whole_high, last - 1, last, q, k, v, k_full, k_free, v_full, v_free, p, total, largest, weight, first, end,
        factor, cap, BLOCK_N, STAGES, True, SCORES, OUT,
    )  # fmt: skip
    p, total, largest, weight = _blocks(
        whole_low, gl.minimum(whole_high, last) - 1, last, q, k, v, k_full, k_free, v_full, v_free, p, total, largest,
        weight, first, end, factor, cap, BLOCK_N, STAGES, False, SCORES, OUT,
    )  # fmt: skip
    if WINDOWED:
        p, total, largest, weight = _blocks(
            last - blocks + 1, gl.minimum(whole_low, last) - 1, last, q, k, v, k_full, k_free, v_full, v_free, p, total,
            largest, weight, first, end, factor, cap, BLOCK_N, STAGES, True, SCORES, OUT,
        )  # fmt: skip
    stage = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(stage), ((blocks - 1) // STAGES) & 1)
    total = warpgroup_mma(p, v.index(stage), total, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    weight = gl.where(weight > 0, weight, 1)
    total = total / gl.convert_layout(weight, gl.SliceLayout(1, OUT))[:, None]

    row = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
    token = start + row // GROUP
    d = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, OUT))
    place = (token.to(gl.int64) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP)[:, None] * VALUE_DIM + d[None, :]
    gl.store(out + place, total.to(DTYPE), mask=(row < count * GROUP)[:, None])


@gluon.jit
def _extend(
    query, out, keys, values, table, items, tiles, sinks, factor, cap, QUERY_TOKEN, QUERY_HEAD, PAGES,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0) % KV_HEADS
    tile = gl.program_id(0) // KV_HEADS
    start = gl.load(tiles + tile * 3)
    count = gl.load(tiles + tile * 3 + 1)
    context = gl.load(tiles + tile * 3 + 2)
    if count == 0:
        return
    # Of the tile's tokens the first sees least of the end, the last least of the beginning.
    final = start + count - 1
    stop = gl.load(items + final * 3 + 2)
    last = (stop + BLOCK_N - 1) // BLOCK_N - 1
    begin = 0
    whole_low = 0
    if WINDOWED:
        begin = gl.load(items + start * 3 + 1) // BLOCK_N
        whole_low = (gl.load(items + final * 3 + 1) + BLOCK_N - 1) // BLOCK_N
    whole_high = gl.load(items + start * 3 + 2) // BLOCK_N  # blocks whole_low to whole_high - 1 are seen whole
    whole_high = gl.maximum(whole_high, whole_low)
    blocks = last - begin + 1
    table += gl.load(items + start * 3).to(gl.int64) * PAGES

    q = gl.allocate_shared_memory(DTYPE, [2, 64, KEY_DIM], gl.NVMMASharedLayout(128, 16))
    k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, KEY_DIM], keys.layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, VALUE_DIM], values.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, query, out, k, v, k_full, k_free, v_full, v_free, items, sinks, factor, cap, QUERY_TOKEN, QUERY_HEAD,
                start, count, head, context, last, blocks, whole_low, whole_high, q.index(0),
                KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_N, STAGES, WINDOWED, DTYPE,
            )),
            (_consume, (
                1, query, out, k, v, k_full, k_free, v_full, v_free, items, sinks, factor, cap, QUERY_TOKEN, QUERY_HEAD,
                start, count, head, context, last, blocks, whole_low, whole_high, q.index(1),
                KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_N, STAGES, WINDOWED, DTYPE,
            )),
            (_fetch, (
                keys, values, k, v, k_full, k_free, v_full, v_free, table, head, last, blocks,
                PAGE, BLOCK_N, STAGES, KEY_DIM, VALUE_DIM,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def extend(query: Tensor, seen: Seen, tiles: Tensor, windowed: bool = True) -> Tensor:
    """Attention of tiles of query tokens over their requests' pages, as `extend.extend`.

    Args:
        query: `[tokens, heads, key_dim]`, bfloat16 or float16, with widths in WIDTHS.
        seen: What they attend to. Aligned blocks of KEYS tokens lie in neighbouring slots.
        tiles: First token, number of tokens (at most `ROWS / heads per key head`) and the request's tokens, int32
            `[tiles, 3]`.
        windowed: Whether any query does not see its request's first token.

    Returns:
        `[tokens, heads, value_dim]`; what no tile names is not written.
    """
    _, kv_heads, key_dim = seen.keys.shape
    heads, value_dim = query.shape[1], seen.values.shape[2]
    out = query.new_empty(len(query), heads, value_dim)
    layout = gl.NVMMASharedLayout(128, 16)
    keys, values = (
        TensorDescriptor.from_tensor(pages.flatten(1), [KEYS, pages.shape[2]], layout)
        for pages in (seen.keys, seen.values)
    )
    _extend[(len(tiles) * kv_heads,)](
        query, out, keys, values, seen.table, seen.items, tiles, seen.sinks, seen.scaling * LOG2E,
        seen.softcap * LOG2E if seen.softcap else None, query.stride(0), query.stride(1), seen.table.shape[1],
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, PAGE=seen.page_size, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_N=KEYS, STAGES=STAGES, WINDOWED=windowed, num_warps=4,
        DTYPE=gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16,
    )  # fmt: skip
    return out
