"""Products with float8_e4m3 weights and activations, `torch._scaled_mm`: twice the tensor cores' rate, since Ada."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from .int_linear import Packed

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def _rows(x, codes, scales, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        near = tl.load(x + row * K + start + column, mask=start + column < K, other=0.0)
        largest = tl.maximum(largest, tl.abs(near.to(tl.float32)))
    scale = tl.maximum(tl.max(largest, 0), 1e-9) / LARGEST
    tl.store(scales + row, scale)
    for start in range(0, K, BLOCK):
        near = tl.load(x + row * K + start + column, mask=start + column < K, other=0.0).to(tl.float32) / scale
        near = tl.minimum(tl.maximum(near, -LARGEST), LARGEST)
        tl.store(codes + row * K + start + column, near.to(codes.dtype.element_ty), mask=start + column < K)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as float8_e4m3fn, a scale for each row: `x ~ codes * scales`; the twin is `reference.float8_rows`.

    Args:
        x: `[rows, inputs]`.

    Returns:
        float8_e4m3fn `[rows, inputs]` and float32 `[rows, 1]`.
    """
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(len(x), 1, dtype=torch.float32)
    block = min(16384, triton.next_power_of_2(x.shape[1]))
    _rows[(len(x),)](x, codes, scales, x.shape[1], BLOCK=block, num_warps=16 if block > 4096 else 8)
    return codes, scales


def serves(x: Tensor, weight: Packed) -> bool:
    """Whether the device and the shapes allow `scaled`: multiples of 16, a scale for each output, bfloat16."""
    outputs, inputs = weight.words.shape
    return (
        weight.kind == "float8"
        and weight.scales.shape[1] == 1
        and outputs % 16 == inputs % 16 == 0
        and x.dtype == torch.bfloat16
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
    )


def scaled(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`, x rounded to float8 row by row, bfloat16 `[rows, outputs]`.

    Args:
        x: `[rows, inputs]`.
        weight: The weight.
        bias: `[outputs]`, or `None`.
    """
    codes, scales = quantize_rows(x)
    right = weight.words.view(torch.float8_e4m3fn).T
    return torch._scaled_mm(codes, right, scales, weight.scales.T, bias=bias, out_dtype=x.dtype)
