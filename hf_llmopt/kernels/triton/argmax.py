"""The best token of a row: a program for each part of a vocabulary, another for each row. Twin: `reference.argmax`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent import early, launch_next, ready

BLOCK = 2048
PARTS = 1024  # of a row, at most


@triton.jit
def _parts(x, best, where, ROW, WIDTH, PARTS, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    launch_next(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    ready(EARLY)
    y = tl.load(x + row * ROW + column, mask=column < WIDTH, other=float("-inf")).to(tl.float32)
    bad = tl.max((y != y).to(tl.int32), 0)
    y = tl.where(y != y, float("-inf"), y)
    largest = tl.max(y, 0)
    first = tl.min(tl.where((y == largest) & (column < WIDTH), column, 2147483647), 0)
    tl.store(best + row * PARTS + part, largest)
    tl.store(where + row * PARTS + part, tl.where(bad > 0, -1, first))


@triton.jit
def _join(best, where, out, PARTS, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    launch_next(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    ready(EARLY)
    y = tl.load(best + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    column = tl.load(where + row * PARTS + part, mask=part < PARTS, other=2147483647)
    first = tl.min(tl.where(y == tl.max(y, 0), column, 2147483647), 0)
    tl.store(out + row, tl.where(tl.min(column, 0) < 0, -1, first).to(tl.int64))


def serves(x: torch.Tensor) -> bool:
    """Whether rows are dense and short enough."""
    return x.dim() == 2 and x.stride(1) == 1 and len(x) > 0 and 0 < x.shape[1] <= BLOCK * PARTS


def argmax(x: torch.Tensor) -> torch.Tensor:
    """The first of the largest elements of each row, -1 for a row that contains NaN.

    Args:
        x: `[rows, width]`, its rows dense, any floating-point format.

    Returns:
        int64 `[rows]`.
    """
    rows, width = x.shape
    parts, how = triton.cdiv(width, BLOCK), early(x.device)
    best = x.new_empty(rows, parts, dtype=torch.float32)
    where = x.new_empty(rows, parts, dtype=torch.int32)
    out = x.new_empty(rows, dtype=torch.long)
    _parts[(rows, parts)](x, best, where, x.stride(0), width, parts, BLOCK=BLOCK, num_warps=4, **how)
    _join[(rows,)](best, where, out, parts, BLOCK=triton.next_power_of_2(parts), num_warps=1, **how)
    return out
