"""Estimated logits of which those that may be the largest of a row are computed: two launches behind the estimates.

The first finds for each part of the vocabulary the best lower bound, the second multiplies the outputs whose upper
bounds reach the best of them. On most places of the grid there is none, and a program ends where it has compared.

The twin is `reference.settle`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .dependent import early, launch_next, ready
from .few import ROWS, Tile, multiplied
from .int_linear import FORMATS, INTERPRETED

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2048  # estimates of a part
OUTPUTS = 64  # of a program
SINGLE, SEVERAL = Tile(16, 512, 4, 1), Tile(16, 256, 2, 4)  # how those that are left are multiplied
SLACK = torch.finfo(torch.float32).eps  # of a sum, times the numbers that were added


@triton.jit
def _off(estimate, error, spread, slack, SPACING: tl.constexpr):
    return error * spread + slack + tl.abs(estimate) * SPACING


@triton.jit
def _bounds(
    estimates, x, error, best, spreads, WIDTH, K, PARTS, slack,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SPACING: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    launch_next(EARLY)
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    off = tl.load(error + column, mask=inside, other=0.0)
    ready(EARLY)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        place = k + tl.arange(0, BLOCK_K)
        near = tl.load(x + row * K + place, mask=place < K, other=0.0).to(tl.float32)
        squares += near * near
    spread = tl.sqrt(tl.sum(squares, 0)) * (1 + K * 1.1920928955078125e-07)
    y = tl.load(estimates + row * WIDTH + column, mask=inside, other=float("-inf")).to(tl.float32)
    least = y - _off(y, off, spread, slack * spread, SPACING)
    tl.store(best + row * PARTS + part, tl.max(tl.where(inside & (least == least), least, float("-inf")), 0))
    if part == 0:
        tl.store(spreads + row, spread)


@triton.jit
def _settle(
    logits, x, weight, error, best, spreads, M, WIDTH, K, PARTS, slack,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, STAGES: tl.constexpr, SPACING: tl.constexpr, TINY: tl.constexpr, DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    launch_next(EARLY)
    token = tl.arange(0, BLOCK_M)
    part = tl.arange(0, BLOCK_P)
    ready(EARLY)
    spread = tl.load(spreads + token, mask=token < M, other=0.0)
    known = (token < M)[:, None] & (part < PARTS)[None, :]
    bounds = tl.load(best + token[:, None] * PARTS + part[None, :], mask=known, other=float("-inf"))
    least = tl.max(bounds, 1)
    bar = least - 2 * slack * spread - 2 * SPACING * tl.abs(least) - 2 * TINY
    bar = tl.where(spread < 1e-15, float("-inf"), bar)  # squares of smaller numbers may vanish
    for first in range(tl.program_id(0) * OUTPUTS, tl.program_id(0) * OUTPUTS + OUTPUTS, BLOCK_N):
        output = first + tl.arange(0, BLOCK_N)
        inside = (output < WIDTH)[:, None] & (token < M)[None, :]
        place = token.to(tl.int64)[None, :] * WIDTH + output[:, None]
        y = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
        off = tl.load(error + output, mask=output < WIDTH, other=0.0)
        upper = y + _off(y, off[:, None], spread[None, :], slack * spread[None, :], SPACING)
        leads = inside & ~(upper < bar[None, :])  # what is not a number leads, too
        if tl.max(leads.to(tl.int32)) > 0:
            rows = tl.minimum(output, WIDTH - 1)
            made = multiplied(x, weight, rows, M, K, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, DTYPE, False)
            tl.store(logits + place, made.to(logits.dtype.element_ty), mask=leads)


def settle(estimates: Tensor, x: Tensor, weight: Tensor, error: Tensor, size: float) -> Tensor:
    """See `reference.settle`; writes into the estimates.

    Args:
        estimates: `[rows, outputs]`, dense, in x's format; at most ROWS rows.
        x: `[rows, inputs]`, dense.
        weight: `[outputs, inputs]`, dense, in x's format.
        error: float32 `[outputs]`.
        size: Largest norm of an output's weights.
    """
    (m, width), k = estimates.shape, x.shape[1]
    parts, spacing = triton.cdiv(width, BLOCK), torch.finfo(x.dtype).eps
    best = x.new_empty(m, parts, dtype=torch.float32)
    spreads = x.new_empty(m, dtype=torch.float32)
    slack, how = size * k * SLACK, early(x.device)
    _bounds[(parts, m)](
        estimates, x, error, best, spreads, width, k, parts, slack,
        BLOCK=BLOCK, BLOCK_K=min(4096, triton.next_power_of_2(k)), SPACING=spacing, num_warps=4, **how,
    )  # fmt: skip
    tile = SINGLE if m == 1 else SEVERAL
    _settle[(triton.cdiv(width, OUTPUTS),)](
        estimates, x, weight, error, best, spreads, m, width, k, parts, slack,
        EVEN=k % tile.inputs == 0, BLOCK_M=1 if m == 1 else ROWS, OUTPUTS=OUTPUTS, BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs, BLOCK_P=triton.next_power_of_2(parts), STAGES=tile.stages, SPACING=spacing,
        TINY=torch.finfo(x.dtype).tiny * spacing,
        DTYPE=FORMATS[torch.float32 if INTERPRETED else x.dtype], num_warps=tile.warps, **how,
    )  # fmt: skip
    return estimates
