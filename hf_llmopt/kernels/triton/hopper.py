"""Attention of long spans over pages on Hopper, in Gluon: what `extend.py` computes, with the chip's own instructions.

One warp fetches blocks of keys and values by the copy engine, two groups of four warps multiply, 64 rows each. A group
puts the next block's scores and the last block's values on the tensor cores, and computes exponentials meanwhile (Shah
et al. 2024, FlashAttention-3). Blocks are passed from the last to the first: masked ones first, then a
loop without masks.

A program computes one tile after the other, so that a tile's first blocks are fetched while the last one's end is
computed. A block must lie in neighbouring slots. The twin is `reference.paged_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .blocks import LOG2E, multiprocessors

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Seen

ROWS = 128  # query rows of a program
KEYS = 128  # of a block
STAGES = 2  # blocks that are fetched ahead
WIDTHS = (64, 128)
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # Triton before 3.7
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _tile(tiles, items, tile, TILES, KV_HEADS: gl.constexpr, WINDOWED: gl.constexpr, BLOCK_N: gl.constexpr):
    """What a program must know of a tile and a key head; tiles that read the same keys follow one another.

    Returns:
        Head, first token, tokens, the request's tokens, the end of what the first token sees, the first and the last
        block that are seen at all, the first block that is seen whole, and the one behind those.
    """
    each = TILES // KV_HEADS
    at = tiles + tile % each * 3
    start = gl.load(at)
    count = gl.load(at + 1)
    end = gl.load(items + start * 3 + 2)
    last = (end + count - 2) // BLOCK_N
    begin = 0
    low = 0
    if WINDOWED:  # the tile's last token sees least of the beginning
        begin = gl.load(items + start * 3 + 1) // BLOCK_N
        low = (gl.load(items + (start + count - 1) * 3 + 1) + BLOCK_N - 1) // BLOCK_N
    high = gl.maximum(end // BLOCK_N, low)
    return tile // each, start, count, gl.load(at + 2), end, begin, last, low, high


@gluon.jit
def _fetch(
    keys, values, k, v, k_full, k_free, v_full, v_free, table, items, tiles, TILES, PAGES,
    KEY_ROWS, KEY_COLUMNS, VALUE_ROWS, VALUE_COLUMNS,
    KV_HEADS: gl.constexpr, PAGE: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    i = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        head, start, _count, _context, _end, begin, last, _low, _high = _tile(
            tiles, items, tile, TILES, KV_HEADS, WINDOWED, BLOCK_N
        )
        pages = table + gl.load(items + start * 3).to(gl.int64) * PAGES
        for block in range(last, begin - 1, -1):
            stage = i % STAGES
            phase = (i // STAGES) & 1
            token = block * BLOCK_N
            slot = gl.load(pages + token // PAGE) * PAGE + token % PAGE
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), BLOCK_N * KEY_DIM * 2)
            fetch(keys, [slot + head * KEY_ROWS, head * KEY_COLUMNS], k_full.index(stage), k.index(stage))
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), BLOCK_N * VALUE_DIM * 2)
            fetch(values, [slot + head * VALUE_ROWS, head * VALUE_COLUMNS], v_full.index(stage), v.index(stage))
            i += 1
    # Keys of a tile that does not exist, so that the last one ends as the others do.
    mbarrier.wait(k_free.index(i % STAGES), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(k_full.index(i % STAGES), BLOCK_N * KEY_DIM * 2)
    fetch(keys, [0, 0], k_full.index(i % STAGES), k.index(i % STAGES))


@gluon.jit
def _softmax(
    s, token, first, end, largest, weight, factor, cap, MASKED: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Weights of a block, by how much less earlier ones count, the largest score so far and the sum of weights."""
    if cap is not None:
        s = cap * (1 - 2 / (gl.exp2(s * (factor * 2.8853900817779268 / cap)) + 1))
        factor = 1.0
    if MASKED:
        sees = token[None, :] < end[:, None]
        if WINDOWED:
            sees = sees & (token[None, :] >= first[:, None])
        s = gl.where(sees, s, float("-inf"))
    now = gl.maximum(largest, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - now[:, None])
    less = gl.exp2(largest - now)
    return p, less, now, weight * less + gl.sum(p, 1)


@gluon.jit
def _bounds(
    part: gl.constexpr, items, start, count, end,
    GROUP: gl.constexpr, WINDOWED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The first token that each row sees, and the end of those."""
    row = part * 64 + gl.arange(0, 64, LAYOUT)
    token = row // GROUP
    first = token * 0
    end += token
    if WINDOWED:
        at = items + (start + token) * 3
        first = gl.load(at + 1, mask=row < count * GROUP, other=0)
        end = gl.load(at + 2, mask=row < count * GROUP, other=0)  # padding on the right ends it sooner
    return first, end


@gluon.jit
def _begin(
    part: gl.constexpr, s, items, sinks, factor, cap, head, start, count, end, last,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, WINDOWED: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Weights of a tile's first block, the largest score and the sum of weights."""
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    first, end = _bounds(part, items, start, count, end, GROUP, WINDOWED, ROWS)
    largest = gl.full([64], -1e30, gl.float32, ROWS)
    weight = gl.zeros([64], gl.float32, ROWS)
    if sinks is not None:  # scores that have no values
        row = part * 64 + gl.arange(0, 64, ROWS)
        sink = gl.load(sinks + head * GROUP + row % GROUP)
        largest = sink.to(gl.float32) * 1.4426950408889634
        weight += 1
    token = last * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    p, _less, largest, weight = _softmax(s, token, first, end, largest, weight, factor, cap, True, WINDOWED)
    return p, largest, weight


@gluon.jit
def _queries(
    part: gl.constexpr, query, q, head, start, count, QUERY_TOKEN, QUERY_HEAD,
    GROUP: gl.constexpr, KEY_DIM: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile's queries."""
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // KEY_DIM, KEY_DIM // 8], [4, 1], [1, 0])
    row = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, LOADS))
    token = start + gl.minimum(row // GROUP, count - 1)  # rows beyond the tile repeat its last token
    d = gl.arange(0, KEY_DIM, gl.SliceLayout(0, LOADS))
    places = query + token.to(gl.int64)[:, None] * QUERY_TOKEN
    copy(q, places + ((head * GROUP + row % GROUP) * QUERY_HEAD)[:, None] + d[None, :])
    async_copy.commit_group()


@gluon.jit
def _blocks(
    part: gl.constexpr, low, high, i, turn, q, k, v, turns, k_full, k_free, v_full, v_free, p, total, largest, weight,
    first, end, factor, cap,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, WINDOWED: gl.constexpr, SCORES: gl.constexpr,
    OUT: gl.constexpr,
):  # fmt: skip
    """Blocks `high` down to `low`; `i` of all blocks were begun before, and `p` holds the weights of the last."""
    for block in range(high, low - 1, -1):
        before = (i - 1) % STAGES
        s, total = _products(part, i, turn, q, k, v, turns, k_full, k_free, v_full, p, total, BLOCK_N, STAGES, SCORES)
        token = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        now, less, largest, weight = _softmax(s, token, first, end, largest, weight, factor, cap, MASKED, WINDOWED)
        total, p = warpgroup_mma_wait(0, deps=[total, p])
        mbarrier.arrive(v_free.index(before))
        total = total * gl.convert_layout(less, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(now.to(p.dtype), p.type.layout)
        i += 1
        turn += 1
    return i, turn, p, total, largest, weight


@gluon.jit
def _products(
    part: gl.constexpr, i, turn, q, k, v, turns, k_full, k_free, v_full, p, total,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Scores of block i; and `total` on its way, with the values of the block before.

    The two groups take turns: while one's products are computed, the other computes exponentials.
    """
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    mbarrier.wait(turns.index(part), (turn & 1) ^ (1 - part))
    zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    s = warpgroup_mma(q, k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    total = warpgroup_mma(p, v.index(before), total, is_async=True)
    mbarrier.arrive(turns.index(1 - part))
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(stage))
    return s, total


@gluon.jit
def _multiply(
    part: gl.constexpr, query, out, q, k, v, turns, k_full, k_free, v_full, v_free, items, tiles, sinks, factor, cap,
    QUERY_TOKEN, QUERY_HEAD, TILES,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0])
    step = gl.num_programs(0)
    head, start, count, context, end, begin, last, low, high = _tile(
        tiles, items, gl.program_id(0), TILES, KV_HEADS, WINDOWED, BLOCK_N
    )
    _queries(part, query, q.index(part), head, start, count, QUERY_TOKEN, QUERY_HEAD, GROUP, KEY_DIM)
    async_copy.wait_group(0)
    fence_async_shared()
    mbarrier.wait(k_full.index(0), 0)
    zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    s = warpgroup_mma(q.index(part), k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    now, largest, weight = _begin(
        part, s, items, sinks, factor, cap, head, start, count, end, last, GROUP, BLOCK_N, WINDOWED, SCORES
    )
    p = gl.convert_layout(now.to(DTYPE), WEIGHTS)
    i = 1
    turn = 0
    other = 0
    for tile in range(gl.program_id(0), TILES, step):
        # The next tile's queries come while this one is computed.
        next_head, next_start, next_count, next_context, next_end, next_begin, next_last, next_low, next_high = _tile(
            tiles, items, gl.minimum(tile + step, TILES - 1), TILES, KV_HEADS, WINDOWED, BLOCK_N
        )
        mine = q.index(2 * other + part)
        other = 1 - other
        theirs = q.index(2 * other + part)
        _queries(part, query, theirs, next_head, next_start, next_count, QUERY_TOKEN, QUERY_HEAD, GROUP, KEY_DIM)
        if (last + 1) * BLOCK_N > context:  # behind the request's last token lies what is nobody's, or others'
            stage = (i - 1) % STAGES
            mbarrier.wait(v_full.index(stage), ((i - 1) // STAGES) & 1)
            own = last * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, VALUES)) < context
            found = v.index(stage).load(VALUES)
            v.index(stage).store(gl.where(own[:, None], found, gl.zeros_like(found)))
            fence_async_shared()
        total = gl.zeros([64, VALUE_DIM], gl.float32, OUT)
        row_first, row_end = _bounds(part, items, start, count, end, GROUP, WINDOWED, gl.SliceLayout(1, SCORES))
        i, turn, p, total, largest, weight = _blocks(
            part, high, last - 1, i, turn, mine, k, v, turns, k_full, k_free, v_full, v_free, p, total, largest, weight,
            row_first, row_end, factor, cap, BLOCK_N, STAGES, True, WINDOWED, SCORES, OUT,
        )  # fmt: skip
        i, turn, p, total, largest, weight = _blocks(
            part, low, gl.minimum(high, last) - 1, i, turn, mine, k, v, turns, k_full, k_free, v_full, v_free, p, total,
            largest, weight, row_first, row_end, factor, cap, BLOCK_N, STAGES, False, WINDOWED, SCORES, OUT,
        )  # fmt: skip
        if WINDOWED:
            i, turn, p, total, largest, weight = _blocks(
                part, begin, gl.minimum(low, last) - 1, i, turn, mine, k, v, turns, k_full, k_free, v_full, v_free, p,
                total, largest, weight, row_first, row_end, factor, cap, BLOCK_N, STAGES, True, WINDOWED, SCORES, OUT,
            )  # fmt: skip
        # The last values beside the first scores of the next tile.
        async_copy.wait_group(0)
        fence_async_shared()
        before = (i - 1) % STAGES
        s, total = _products(
            part, i, turn, theirs, k, v, turns, k_full, k_free, v_full, p, total, BLOCK_N, STAGES, SCORES
        )
        share = gl.convert_layout(1 / gl.where(weight > 0, weight, 1), gl.SliceLayout(1, OUT))
        now, largest, weight = _begin(
            part, s, items, sinks, factor, cap, next_head, next_start, next_count, next_end, next_last, GROUP, BLOCK_N,
            WINDOWED, SCORES,
        )  # fmt: skip
        total, p = warpgroup_mma_wait(0, deps=[total, p])
        mbarrier.arrive(v_free.index(before))
        p = gl.convert_layout(now.to(DTYPE), WEIGHTS)
        i += 1
        turn += 1
        total = total * share[:, None]
        row = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
        token = start + row // GROUP
        d = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, OUT))
        place = (token.to(gl.int64) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP)[:, None] * VALUE_DIM
        gl.store(out + place + d[None, :], total.to(DTYPE), mask=(row < count * GROUP)[:, None])
        head, start, count, context, end = next_head, next_start, next_count, next_context, next_end
        begin, last, low, high = next_begin, next_last, next_low, next_high


@gluon.jit
def _extend(
    query, out, keys, values, table, items, tiles, sinks, factor, cap, QUERY_TOKEN, QUERY_HEAD, TILES, PAGES,
    KEY_ROWS, KEY_COLUMNS, VALUE_ROWS, VALUE_COLUMNS,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    q = gl.allocate_shared_memory(DTYPE, [4, 64, KEY_DIM], gl.NVMMASharedLayout(128, 16))
    k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, KEY_DIM], keys.layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, VALUE_DIM], values.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                0, query, out, q, k, v, turns, k_full, k_free, v_full, v_free, items, tiles, sinks, factor, cap,
                QUERY_TOKEN, QUERY_HEAD, TILES,
                KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_N, STAGES, WINDOWED, DTYPE,
            )),
            (_multiply, (
                1, query, out, q, k, v, turns, k_full, k_free, v_full, v_free, items, tiles, sinks, factor, cap,
                QUERY_TOKEN, QUERY_HEAD, TILES,
                KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_N, STAGES, WINDOWED, DTYPE,
            )),
            (_fetch, (
                keys, values, k, v, k_full, k_free, v_full, v_free, table, items, tiles, TILES, PAGES,
                KEY_ROWS, KEY_COLUMNS, VALUE_ROWS, VALUE_COLUMNS,
                KV_HEADS, PAGE, KEY_DIM, VALUE_DIM, BLOCK_N, STAGES, WINDOWED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def reads(pages: Tensor) -> bool:
    """Whether the copy engine can fetch blocks of a head: rows of a matrix, 16 bytes apart or a multiple of that."""
    slot, head, _ = pages.stride()
    return pages.data_ptr() % 16 == 0 and slot % 8 == 0 and (head < slot or head % slot == 0)


def _described(pages: Tensor) -> tuple[TensorDescriptor, int, int]:
    """Slots as a matrix for the copy engine, and how many rows and columns of it a head is behind the one before."""
    slots, kv_heads, width = pages.shape
    slot, head, _ = pages.stride()
    rows, columns = divmod(head, slot)
    shape = slots + (kv_heads - 1) * rows, (kv_heads - 1) * columns + width
    matrix = pages.as_strided(shape, (slot, 1))
    return TensorDescriptor.from_tensor(matrix, [KEYS, width], gl.NVMMASharedLayout(128, 16)), rows, columns


def extend(query: Tensor, seen: Seen, tiles: Tensor, windowed: bool = True) -> Tensor:
    """Attention of tiles of query tokens over their requests' pages, as `extend.extend`.

    Args:
        query: `[tokens, heads, key_dim]`, bfloat16 or float16, with widths in WIDTHS.
        seen: What they attend to. Aligned blocks of KEYS tokens lie in neighbouring slots.
        tiles: As for `extend.extend`, at most `ROWS / heads per key head` tokens each, and none empty.
        windowed: Whether any query does not see its request's first token.

    Returns:
        `[tokens, heads, value_dim]`; what no tile names is not written.
    """
    kv_heads, key_dim, value_dim = seen.shape
    heads = query.shape[1]
    out = query.new_empty(len(query), heads, value_dim)
    (keys, *key_head), (values, *value_head) = (_described(pages) for pages in (seen.keys, seen.values))
    programs = len(tiles) * kv_heads
    _extend[(min(programs, multiprocessors(query.device)),)](
        query, out, keys, values, seen.table, seen.items, tiles, seen.sinks, seen.scaling * LOG2E,
        seen.softcap * LOG2E if seen.softcap else None, query.stride(0), query.stride(1), programs,
        seen.table.shape[1], *key_head, *value_head,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, PAGE=seen.page_size, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_N=KEYS, STAGES=STAGES, WINDOWED=windowed, num_warps=4,
        DTYPE=gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16,
    )  # fmt: skip
    return out
