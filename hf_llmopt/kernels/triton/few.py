"""Dense products of few rows, which take as long as reading their weights.

One launch serves up to three weights that multiply the same rows (query, key and value, say), or gate and up with the
activation between them; what follows a product (bias, factor, residual) is done before it is written. One row is
multiplied without tensor cores: a program reads a few outputs' weights in long runs and adds in float32.

The twin is `reference.linear` and `reference.gated`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from .dependent import early, launch_next, ready
from .gated import activated, finished, part_of, put
from .int_linear import FORMATS, INTERPRETED, TOGETHER

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Product

ROWS = 16  # most that are multiplied here


class Tile(NamedTuple):
    """What a program computes.

    Attributes:
        outputs: Of the product.
        inputs: That are read at a time.
        warps: Of the program.
        stages: Of loading.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def multiplied(
    x, weight, rows, M, K, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Outputs `rows` of all rows of x, float32 `[BLOCK_N, BLOCK_M]`; `WAIT` for x, and ask for weights before."""
    column = tl.arange(0, BLOCK_K)
    token = tl.arange(0, BLOCK_M)
    places = weight + rows.to(tl.int64)[:, None] * K + column[None, :]
    if BLOCK_M == 1:
        w = tl.load(places) if EVEN else tl.load(places, mask=(column < K)[None, :], other=0.0)
        ready(WAIT)
        near = tl.load(x + column, mask=column < K, other=0.0)
        total = w.to(tl.float32) * near.to(tl.float32)[None, :]
    else:
        ready(WAIT)
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(BLOCK_K if BLOCK_M == 1 else 0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(places + k)
        else:
            w = tl.load(places + k, mask=(k + column < K)[None, :], other=0.0)
        if BLOCK_M == 1:
            near = tl.load(x + k + column, mask=k + column < K, other=0.0)
            total += w.to(tl.float32) * near.to(tl.float32)[None, :]
        else:
            seen = (token < M)[:, None] & (k + column < K)[None, :]
            near = tl.load(x + token[:, None] * K + k + column[None, :], mask=seen, other=0.0)
            total = tl.dot(w.to(DTYPE), tl.trans(near.to(DTYPE)), total, input_precision="ieee")
    if BLOCK_M == 1:
        return tl.sum(total, 1)[:, None]
    else:
        return total


@triton.jit
def _few(
    x, first, second, third, first_bias, second_bias, third_bias, residual, out, factor, M, N0, N1, N2, K,
    KIND: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    launch_next(EARLY and BLOCK_M == 1)
    PARTS: tl.constexpr = 1 if KIND is not None or second is None else 2 if third is None else 3
    which, tile, outputs, column = part_of(tl.program_id(0), N0, N1, N2, PARTS, BLOCK_N)
    dtype = out.dtype.element_ty
    weight = first
    bias = first_bias
    width = N0
    if PARTS > 1:
        width = N0 + N1 + N2
        if which == 1:
            weight = second
            bias = second_bias
    if PARTS > 2:  # noqa: SIM102 - what is not there is not compiled
        if which == 2:
            weight = third
            bias = third_bias
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(output, outputs - 1)
    y = multiplied(x, weight, rows, M, K, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, DTYPE, EARLY)
    y = finished(y, bias, rows, factor, dtype)
    if KIND is not None:
        y = activated(y, KIND).to(dtype).to(tl.float32)
        if second is not None:
            up = multiplied(x, second, rows, M, K, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, DTYPE, False)
            y = y * finished(up, second_bias, rows, factor, dtype)
    launch_next(EARLY and BLOCK_M > 1)
    put(y, out, residual, tl.arange(0, BLOCK_M), output, M, outputs, width, column)


def few(x: Tensor, of: Sequence[Product], kind: str | None, residual: Tensor | None, tile: Tile) -> Tensor:
    """Products of the same rows beside one another, or `act(x @ first^T) * (x @ second^T)`; plus a residual.

    Args:
        x: `[rows, inputs]`, dense; at most ROWS rows.
        of: Up to TOGETHER products of dense weights in x's format, alike but for their weights' outputs: all or none
            have a bias, and their factor is the same.
        kind: An activation, as `reference.gated` knows it: then `of` are gate and up, or a plain MLP's first product.
        residual: `[rows, outputs]`, dense, or `None`.
        tile: What a program computes.

    Returns:
        `[rows, outputs of all]`, or those of one with an activation.
    """
    m, k = x.shape
    weights: list[Tensor | None] = [product.weight for product in of]
    biases = [product.bias for product in of]
    counts = [product.weight.shape[0] for product in of]
    missing = [None] * (TOGETHER - len(of))
    shown = counts[:1] if kind else counts
    out = x.new_empty(m, sum(shown))
    _few[(sum(triton.cdiv(count, tile.outputs) for count in shown),)](
        x, *weights, *missing, *biases, *missing, residual, out, None if of[0].factor == 1 else of[0].factor,
        m, *counts, *([0] * len(missing)), k, KIND=kind, EVEN=k % tile.inputs == 0,
        BLOCK_M=1 if m == 1 else ROWS, BLOCK_N=tile.outputs, BLOCK_K=tile.inputs, STAGES=tile.stages,
        DTYPE=FORMATS[torch.float32 if INTERPRETED else x.dtype], num_warps=tile.warps, **early(x.device),
    )  # fmt: skip
    return out
