"""What both attention kernels do with a block of keys: find it in the pages, score it, add it to an online softmax.

For rows of queries with scores `s` in units of log 2, the largest score so far `m`, the sum of weights `l` and the
weighted values `o` (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1):

    m' = max(m, max s)      l' = l 2^(m - m') + sum 2^(s - m')      o' = o 2^(m - m') + 2^(s - m') v

A page's number format is a matter of `codes_of`, `rows_of`, `score` and `add`: codes become numbers in registers, and
their scales multiply columns of scores and of weights, not keys and values.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .int_linear import INTERPRETED

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import PageFormat, Seen

FORMATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
LOG2E = 1.4426950408889634
LEAST = tl.constexpr(-1e30)  # of a row that has seen nothing; finite, so that no difference is NaN


FORMS = ("int8", "fp8")  # of pages that kernels read


def codes_of(rows: Tensor, form: PageFormat | None, kv_heads: int, width: int) -> tuple[Tensor, Tensor | None]:
    """What a layer's slots hold: numbers or codes `[slots, kv_heads, width]`, and the scales of codes; views.

    Args:
        rows: `[slots, kv_heads, width]`, or bytes as `PageFormat` says.
        form: Of quantized pages, one of FORMS.
        kv_heads: Heads of a slot.
        width: Of a head.
    """
    if form is None:
        return rows, None
    codes, scales = rows[:, 0].split([kv_heads * width, rows.shape[2] - kv_heads * width], dim=1)
    number = torch.int8 if form.name == "int8" else torch.float8_e4m3fn
    return codes.view(number).unflatten(1, (kv_heads, width)), scales.view(torch.bfloat16)


def arguments(query: Tensor, seen: Seen) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both kernels are told of the pages: tensors in order, and constants.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What its tokens attend to.
    """
    kv_heads, key_dim, value_dim = seen.shape
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
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_of(key_dim),
        "BLOCK_V": block_of(value_dim),
        "DTYPE": FORMATS[torch.float32 if INTERPRETED else query.dtype],  # the interpreter cannot multiply bfloat16
    }
    return (keys, values, key_scales, value_scales, seen.table, seen.items), constants


def block_of(width: int) -> int:
    """The width of a tile that holds heads of a width: tensor cores take no less than 16."""
    return max(16, triton.next_power_of_2(width))


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
    return page.to(tl.int64) * PAGE + token % PAGE


@triton.jit
def rows_of(
    pages, slots, seen, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr
):
    """Keys or values of a block, `[BLOCK_N, BLOCK_D]`, MASKED: 0 where no query sees them.

    `pages` is the address of a head's numbers in slot 0.
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
    return found.to(DTYPE)


@triton.jit
def score(q, k, scales, factor, cap):
    """Scores of a block in units of log 2, `[BLOCK_M, BLOCK_N]`.

    Args:
        q: Queries `[BLOCK_M, BLOCK_D]`.
        k: Keys `[BLOCK_N, BLOCK_D]`.
        scales: Of the keys, `[BLOCK_N]`, or `None`.
        factor: Scaling times log2(e).
        cap: Softcap times log2(e), or `None`.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if scales is not None:
        s = s * scales[None, :]
    s = s * factor
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
def add(s, v, scales, total, largest, weight):
    """Take a block into the online softmax.

    Args:
        s: Scores `[BLOCK_M, BLOCK_N]`.
        v: Values `[BLOCK_N, BLOCK_V]`.
        scales: Of the values, `[BLOCK_N]`, or `None`.
        total: Weighted values so far, float32 `[BLOCK_M, BLOCK_V]`.
        largest: Largest score so far, float32 `[BLOCK_M]`.
        weight: Sum of weights so far.
    """
    now = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s - now[:, None])
    less = tl.exp2(largest - now)
    weight = weight * less + tl.sum(p, 1)
    if scales is not None:
        p = p * scales[None, :]
    total = tl.dot(p.to(v.dtype), v, total * less[:, None], input_precision="ieee")
    return total, now, weight
