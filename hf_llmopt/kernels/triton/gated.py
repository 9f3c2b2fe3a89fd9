"""What follows a product: bias and factor, activations of gated and plain MLPs. The twin is `reference.gated`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .dependent import early, launch_next, ready

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(tl.minimum(-x, 80.0)))  # e^88 is too large for float32


@triton.jit
def activated(x, KIND: tl.constexpr):
    """An activation in float32."""
    if KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "gelu_tanh":  # 1 + tanh(z) = 2 sigmoid(2z)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.maximum(x, 0.0)
        if KIND == "relu2":
            y = y * y
    return y


@triton.jit
def finished(y, bias, rows, factor, DTYPE: tl.constexpr):
    """A product `[outputs, tokens]` with bias and factor, rounded where the model rounds."""
    if bias is not None:
        y += tl.load(bias + rows).to(tl.float32)[:, None]
    y = y.to(DTYPE).to(tl.float32)
    if factor is not None:
        y = (y * factor).to(DTYPE).to(tl.float32)
    return y


@triton.jit
def part_of(tile, N0, N1, N2, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of up to three products a tile belongs to, its place there, outputs of that product, those before it."""
    which = 0
    outputs = N0
    column = 0
    if PARTS > 1:
        before = tl.cdiv(N0, BLOCK_N)
        if tile >= before:
            tile -= before
            which = 1
            outputs = N1
            column = N0
    if PARTS > 2:
        before = tl.cdiv(N1, BLOCK_N)
        if (which == 1) & (tile >= before):
            tile -= before
            which = 2
            outputs = N2
            column = N0 + N1
    return which, tile, outputs, column


@triton.jit
def put(y, out, residual, token, output, M, outputs, width, column):
    """Write a tile `[outputs, tokens]`, plus a residual, into rows of `width`."""
    dtype = out.dtype.element_ty
    inside = (token < M)[None, :] & (output < outputs)[:, None]
    place = token.to(tl.int64)[None, :] * width + column + output[:, None]
    if residual is not None:
        y = y.to(dtype).to(tl.float32) + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(dtype), mask=inside)


@triton.jit
def _gated(gate, up, out, ROW, UP_ROW, WIDTH, KIND: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    launch_next(EARLY)
    ready(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    dtype = out.dtype.element_ty
    y = activated(tl.load(gate + row * ROW + column, mask=inside, other=0.0).to(tl.float32), KIND).to(dtype)
    if up is not None:
        y = y.to(tl.float32) * tl.load(up + row * UP_ROW + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, y.to(dtype), mask=inside)


def gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)`.

    Args:
        gate: `[rows, width]`, its rows maybe parts of wider ones.
        up: Likewise, or `None`.
        kind: As `reference.gated` knows it.
    """
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    grid = rows, triton.cdiv(width, BLOCK)
    _gated[grid](
        gate, up, out, gate.stride(0), 0 if up is None else up.stride(0), width, kind, BLOCK, num_warps=4,
        **early(gate.device),
    )  # fmt: skip
    return out
