"""Keys and values on their way into quantized pages; the twin is `reference.pack_rows`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .blocks import FORMATS
from .planes import picked, turned

if TYPE_CHECKING:
    from torch import Tensor

    from ..arguments import PageFormat

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even


@triton.jit
def _rounded_up(x):
    """To bfloat16 and back, away from zero where x is positive."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(x > 0, bits + 0xFFFF, bits) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pack(
    x, codes, parts, TOKEN, HEAD, ROW: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    FORM: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (h < HEADS) & (d < DIM)
    wide = tl.load(x + token * TOKEN + h * HEAD + d, mask=inside, other=0).to(tl.float32)
    if ROTATES:
        wide = turned(wide, DIM)
    codes += token * ROW
    parts += token * (ROW // 2)
    if FORM == "int4":
        low = -_rounded_up(-tl.min(tl.where(inside, wide, float("inf")), 1, keep_dims=True))
        top = tl.max(tl.where(inside, wide, float("-inf")), 1, keep_dims=True)
        scale = _rounded_up(tl.div_rn(top - low, tl.full(low.shape, 15, tl.float32)))
        exact = tl.div_rn(wide - low, tl.broadcast_to(tl.where(scale > 0, scale, 1), wide.shape))
        code = tl.where(exact == exact, tl.minimum(tl.maximum(exact + MAGIC - MAGIC, 0), 15), 0)
        half = tl.arange(0, BLOCK_D // 2)[None, :]
        first = picked(code, half).to(tl.int32)
        second = picked(code, tl.minimum(half + DIM // 2, BLOCK_D - 1)).to(tl.int32)
        mask = (h < HEADS) & (half < DIM // 2)
        tl.store(codes + h * (DIM // 2) + half, (first | second << 4).to(tl.uint8), mask=mask)
        tl.store(parts + h * 2, scale.to(tl.bfloat16), mask=h < HEADS)
        tl.store(parts + h * 2 + 1, low.to(tl.bfloat16), mask=h < HEADS)
    else:
        top = tl.max(tl.abs(wide), 1, keep_dims=True)
        scale = _rounded_up(tl.div_rn(top, tl.full(top.shape, 127 if FORM == "int8" else 448, tl.float32)))
        code = tl.div_rn(wide, tl.broadcast_to(tl.where(scale > 0, scale, 1), wide.shape))
        code = tl.where(code == code, code, 0)
        if FORM == "int8":
            code = code + MAGIC - MAGIC
        tl.store(codes + h * DIM + d, code.to(codes.dtype.element_ty), mask=inside)
        tl.store(parts + h, scale.to(tl.bfloat16), mask=h < HEADS)


def serves(x: Tensor, form: PageFormat) -> bool:
    """Whether the kernel packs these: scales lie at even bytes, and GPUs since Ada convert to float8."""
    converts = form.name != "fp8" or not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)
    return x.dtype in FORMATS and x.shape[2] % (2 * form.parts) == 0 and converts


def pack_rows(x: Tensor, form: PageFormat, rotates: bool = False) -> Tensor:
    """See `reference.pack_rows`; the last axis of `x` is contiguous."""
    tokens, kv_heads, width = x.shape
    rows = torch.empty(tokens, 1, form.row_bytes(kv_heads, width), dtype=torch.uint8, device=x.device)
    size = kv_heads * width * form.bits // 8
    numbers = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[form.name]
    codes, parts = rows[:, 0, :size].view(numbers), rows[:, 0, size:].view(torch.bfloat16)
    _pack[(tokens,)](
        x, codes, parts, x.stride(0), x.stride(1), rows.shape[2],
        HEADS=kv_heads, DIM=width, BLOCK_H=triton.next_power_of_2(kv_heads), BLOCK_D=triton.next_power_of_2(width),
        FORM=form.name, ROTATES=rotates,
    )  # fmt: skip
    return rows
