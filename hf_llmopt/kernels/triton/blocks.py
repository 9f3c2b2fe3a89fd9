"""What both attention kernels do with a block of keys: find it in the pages, score it, add it to an online softmax.

For rows of queries with scores `s` in units of log 2, the largest score so far `m`, the sum of weights `l` and the
weighted values `o` (Milakov and Gimelshein 2018; Dao et al. 2022):

    m' = max(m, max s)      l' = l 2^(m - m') + sum 2^(s - m')      o' = o 2^(m - m') + 2^(s - m') v

A page's number format is a matter of `codes_of`, `rows_of`, `scales_of`, `score` and `add`: codes become numbers in
registers, and their scales multiply columns of scores and of weights, not keys and values. Keys and values of quantized
pages, and queries and results with them, are two or four tiles, planes of the head (`planes.py`), and a dot product is
the sum of as many.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .int_linear import INTERPRETED
from .planes import PLANES, columns, numbers, plane, turned

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import PageFormat, Seen

FORMATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
LOG2E = 1.4426950408889634
LEAST = tl.constexpr(-1e30)  # of a row that has seen nothing; finite, so that no difference is NaN


def codes_of(rows: Tensor, form: PageFormat | None, kv_heads: int, width: int) -> tuple[Tensor, Tensor | None]:
    """What a layer's slots hold; views.

    Args:
        rows: `[slots, kv_heads, width]`, or bytes as `PageFormat` says.
        form: Of quantized pages.
        kv_heads: Heads of a slot.
        width: Of a head, even, and with 4 bits a multiple of 8.

    Returns:
        Numbers `[slots, kv_heads, width]`, or int16 of which each holds the codes of two bytes, `[slots, kv_heads, *]`;
        and the scales of codes, bfloat16 `[slots, kv_heads]`, with 4 bits int32: a scale, and in the high half the
        lowest value.
    """
    if form is None:
        return rows, None
    size = kv_heads * width * form.bits // 8
    codes, scales = rows[:, 0].split([size, rows.shape[2] - size], dim=1)
    pairs = codes.view(torch.int16).unflatten(1, (kv_heads, -1))
    return pairs, scales.view(torch.int32 if form.bits == 4 else torch.bfloat16)


def arguments(query: Tensor, seen: Seen) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both kernels are told of the pages: tensors in order, and constants.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What its tokens attend to.
    """
    kv_heads, key_dim, value_dim = seen.shape
    form = "" if seen.form is None else seen.form.name
    share = PLANES[form]
    keys, key_scales = codes_of(seen.keys, seen.form, kv_heads, key_dim)
    values, value_scales = codes_of(seen.values, seen.form, kv_heads, value_dim)
    constants = {
        "KEY_SLOT": keys.stride(0),
        "VALUE_SLOT": values.stride(0),
        "KEY_SCALES": 0 if key_scales is None else key_scales.stride(0),
        "VALUE_SCALES": 0 if value_scales is None else value_scales.stride(0),
        "KV_HEADS": kv_heads,
        "GROUP": query.shape[1] // kv_heads,
        "PAGE": seen.page_size,
        "KEY_DIM": key_dim // share,
        "VALUE_DIM": value_dim // share,
        "BLOCK_D": block_of(key_dim // share),
        # Triton gives every warp all 16 rows and some columns only where there are more columns than rows.
        "BLOCK_V": block_of(value_dim // share) if share == 1 else max(32, block_of(value_dim // share)),
        "FORM": form,
        "DTYPE": FORMATS[torch.float32 if INTERPRETED else query.dtype],  # the interpreter cannot multiply bfloat16
    }
    return (keys, values, key_scales, value_scales, seen.table, seen.items), constants


def block_of(width: int) -> int:
    """The width of a tile that holds heads of a width: tensor cores take no less than 16."""
    return max(16, triton.next_power_of_2(width))


def reads(form: PageFormat | None, width: int) -> bool:
    """Whether kernels read pages that hold heads of a width in this format: two bytes of codes at a time."""
    return form is None or width % (8 if form.bits == 4 else 2) == 0


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter has few, so that tests split keys as a GPU does."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def slots_of(table, token, seen, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """Slots of tokens of a request, int64; what is not seen lies in page 0."""
    if MASKED:
        page = tl.load(table + token // PAGE, mask=seen, other=0)
    else:
        page = tl.load(table + token // PAGE)
    # Triton 3.6 takes what divides the first slot of a page for what divides each one, and would read too much at once.
    return tl.multiple_of(page.to(tl.int64) * PAGE + token % PAGE, 1)


@triton.jit
def queries_of(
    query, token, head, mine, QUERY_TOKEN, QUERY_HEAD,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Queries `[BLOCK_M, BLOCK_D]`, or their planes; for 4-bit keys turned as those are, and their sum behind."""
    places = query + token.to(tl.int64)[:, None] * QUERY_TOKEN + head[:, None] * QUERY_HEAD
    if FORM == "":
        d = tl.arange(0, BLOCK_D)
        q = tl.load(places + d[None, :], mask=mine[:, None] & (d < DIM)[None, :], other=0).to(DTYPE)
    elif FORM == "int4":
        d = tl.arange(0, 4 * BLOCK_D)
        whole = tl.load(places + d[None, :], mask=mine[:, None] & (d < 4 * DIM)[None, :], other=0).to(tl.float32)
        whole = turned(whole, 4 * DIM).to(DTYPE).to(tl.float32)
        q = (
            plane(whole, 0, DIM, BLOCK_D, FORM).to(DTYPE),
            plane(whole, 1, DIM, BLOCK_D, FORM).to(DTYPE),
            plane(whole, 2, DIM, BLOCK_D, FORM).to(DTYPE),
            plane(whole, 3, DIM, BLOCK_D, FORM).to(DTYPE),
            tl.sum(whole, 1),
        )
    else:
        r = tl.arange(0, BLOCK_D)
        mask = mine[:, None] & (r < DIM)[None, :]
        q = (
            tl.load(places + columns(r, 0, DIM, FORM)[None, :], mask=mask, other=0).to(DTYPE),
            tl.load(places + columns(r, 1, DIM, FORM)[None, :], mask=mask, other=0).to(DTYPE),
        )
    return q


@triton.jit
def nothing(BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, FORM: tl.constexpr):
    """Weighted values of no keys."""
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if FORM == "int4":
        total = (total, total, total, total)
    elif FORM != "":
        total = (total, total)
    return total


@triton.jit
def put(out, rows, total, weight, mine, DIM: tl.constexpr, BLOCK_V: tl.constexpr, FORM: tl.constexpr):
    """Write weighted values over the sums of weights, `[BLOCK_M, 1]`, to rows of `out`."""
    v = tl.arange(0, BLOCK_V)
    mask = mine[:, None] & (v < DIM)[None, :]
    if FORM == "":
        places = out + rows[:, None] * DIM + v[None, :]
        tl.store(places, (total / weight).to(out.dtype.element_ty), mask=mask)
    else:
        COUNT: tl.constexpr = 4 if FORM == "int4" else 2
        for j in tl.static_range(COUNT):
            places = out + rows[:, None] * (COUNT * DIM) + columns(v, j, DIM, FORM)[None, :]
            tl.store(places, (total[j] / weight).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rows_of(
    pages, slots, seen, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    DTYPE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Keys or values of a block, `[BLOCK_N, BLOCK_D]`, or their planes.

    What no query sees is 0 where MASKED, or finite with 4 bits. `pages` is the address of a head's numbers in slot 0.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    places = pages + slots[:, None] * stride + d
    if BLOCK_D != DIM:
        inside = d < DIM
        if MASKED:
            inside = inside & seen[:, None]
        found = tl.load(places, mask=inside, other=0.0)
    elif MASKED:
        found = tl.load(places, mask=seen[:, None], other=0.0)
    else:
        found = tl.load(places)
    if FORM == "":
        rows = found.to(DTYPE)
    else:
        rows = numbers(found, FORM, DTYPE)
    return rows


@triton.jit
def scales_of(scales, slots, seen, stride, head):
    """Scales of a block's keys or values, `[BLOCK_N]`; of 4 bits also what code 8 stands for."""
    found = tl.load(scales + slots * stride + head, mask=seen, other=0)
    if found.dtype == tl.int32:
        scale = (found << 16).to(tl.float32, bitcast=True)
        read = (scale, (found & -65536).to(tl.float32, bitcast=True) + 8 * scale)
    else:
        read = found.to(tl.float32)
    return read


@triton.jit
def score(q, k, scales, factor, cap, FORM: tl.constexpr):
    """Scores of a block in units of log 2, `[BLOCK_M, BLOCK_N]`.

    Args:
        q: As from `queries_of`.
        k: As from `rows_of`.
        scales: Of the keys, as from `scales_of`, or `None`.
        factor: Scaling times log2(e).
        cap: Softcap times log2(e), or `None`.
        FORM: Of the pages.
    """
    if FORM == "":
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    else:
        s = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
        s = tl.dot(q[1], tl.trans(k[1]), s, input_precision="ieee")
        if FORM == "int4":
            s = tl.dot(q[2], tl.trans(k[2]), s, input_precision="ieee")
            s = tl.dot(q[3], tl.trans(k[3]), s, input_precision="ieee")
            s = s * (scales[0] * factor)[None, :] + q[4][:, None] * (scales[1] * factor)[None, :]
        else:
            s = s * (scales * factor)[None, :]
    if cap is not None:
        s = cap * _tanh(s / cap)
    return s


@triton.jit
def _tanh(x):
    """By e^2x; near 0, where that loses digits, by the series."""
    y = x * x
    series = x * (1 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp2(x * 2.8853900817779268) + 1))


@triton.jit
def visible(s, token, first, end, tree, TREE: tl.constexpr):
    """Scores, less than any other where a query does not see a key."""
    back = end[:, None] - 1 - token[None, :]
    sees = (token[None, :] >= first[:, None]) & (back >= 0)
    if TREE:
        bit = tree[:, None] >> tl.minimum(tl.maximum(back, 0), 31)
        sees = sees & ((back >= 32) | ((bit & 1) != 0))
    return tl.where(sees, s, float("-inf"))


@triton.jit
def add(s, v, scales, total, largest, weight, FORM: tl.constexpr):
    """Take a block into the online softmax.

    Args:
        s: Scores `[BLOCK_M, BLOCK_N]`.
        v: Values, as from `rows_of`.
        scales: Of the values, as from `scales_of`, or `None`.
        total: Weighted values so far, float32 `[BLOCK_M, BLOCK_V]`, or their planes.
        largest: Largest score so far, float32 `[BLOCK_M]`.
        weight: Sum of weights so far.
        FORM: Of the pages.
    """
    now = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s - now[:, None])
    less = tl.exp2(largest - now)
    weight = weight * less + tl.sum(p, 1)
    less = less[:, None]
    if FORM == "":
        total = tl.dot(p.to(v.dtype), v, total * less, input_precision="ieee")
    elif FORM == "int4":
        middle = tl.sum(p * scales[1][None, :], 1)[:, None]  # every value's part that is not in its code
        p = (p * scales[0][None, :]).to(v[0].dtype)
        total = (
            tl.dot(p, v[0], total[0] * less + middle, input_precision="ieee"),
            tl.dot(p, v[1], total[1] * less + middle, input_precision="ieee"),
            tl.dot(p, v[2], total[2] * less + middle, input_precision="ieee"),
            tl.dot(p, v[3], total[3] * less + middle, input_precision="ieee"),
        )
    else:
        p = (p * scales[None, :]).to(v[0].dtype)
        total = (
            tl.dot(p, v[0], total[0] * less, input_precision="ieee"),
            tl.dot(p, v[1], total[1] * less, input_precision="ieee"),
        )
    return total, now, weight
