"""LayerNorm and RMSNorm: a program for each row. The twin is `reference.norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .dependent import early, launch_next, ready

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import Norm


@triton.jit
def normalized(
    x, weight, bias, column, inside, epsilon,
    WIDTH: tl.constexpr, CENTRE: tl.constexpr, VARIANT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A row in float32, rounded where the model rounds; `x` is float32 and 0 outside.

    `weight` and `bias` are addresses, or `None`; `column` says which of them belong to x.
    """
    if CENTRE:
        x = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + epsilon)
    if not CENTRE and VARIANT == 0:
        y = y.to(DTYPE).to(tl.float32)
    if weight is not None:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        y = y * (factor + 1 if VARIANT == 1 else factor)
    if bias is not None:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm(
    x, weight, bias, out, epsilon, ROW, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr, VARIANT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    launch_next(EARLY)
    ready(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = x + row // GROUPS * ROW + row % GROUPS * WIDTH + column
    wide = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    y = normalized(wide, weight, bias, column, inside, epsilon, WIDTH, CENTRE, VARIANT, dtype)
    tl.store(out + row * WIDTH + column, y.to(dtype), mask=inside)


def norm(x: Tensor, how: Norm) -> Tensor:
    """The norm of every `how.width` neighbours of a row.

    Args:
        x: `[rows, columns]`, its rows maybe parts of wider ones; a multiple of `how.width` columns.
        how: The norm.
    """
    rows, columns = x.shape
    out = x.new_empty(rows, columns)
    block = triton.next_power_of_2(how.width)
    _norm[(rows * columns // how.width,)](
        x, how.weight, how.bias, out, how.epsilon, x.stride(0), columns // how.width, how.width, block,
        how.centre, how.variant, num_warps=min(16, max(1, block // 512)), **early(x.device),
    )  # fmt: skip
    return out
