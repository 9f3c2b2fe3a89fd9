"""Keys and values as quantized pages hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import PageFormat


def hadamard(x: Tensor) -> Tensor:
    """The last axis times a Hadamard matrix over the square root of its size (Sylvester's construction).

    The matrix is its own inverse. Where the axis is no power of two long, blocks of the largest one that divides it are
    multiplied.

    Example:
        >>> import torch
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    width = x.shape[-1] & -x.shape[-1]
    y, step = x.float().reshape(-1, width), 1
    while step < width:
        low, high = y.view(-1, width // (2 * step), 2, step).unbind(2)
        y, step = torch.stack([low + high, low - high], dim=2).view(-1, width), 2 * step
    return (y * width**-0.5).reshape(x.shape).to(x.dtype)


def pack_rows(x: Tensor, form: PageFormat, rotates: bool = False) -> Tensor:
    """What quantized pages hold of keys or values.

    Args:
        x: `[tokens, kv_heads, width]`; the width is even with 4 bits.
        form: See `PageFormat`.
        rotates: Multiply by a Hadamard matrix first.

    Returns:
        uint8 `[tokens, 1, bytes]`.
    """
    wide = hadamard(x.float()) if rotates else x.float()
    if form.bits == 4:
        low = -_rounded_up(-wide.amin(-1, keepdim=True))
        scale = _rounded_up((wide.amax(-1, keepdim=True) - low) / 15)
        codes = torch.nan_to_num(((wide - low) / scale).round()).clamp(0, 15).to(torch.uint8)
        first, second = codes.chunk(2, dim=-1)
        codes, parts = first | second << 4, torch.cat([scale, low], dim=-1)
    else:
        parts = scale = _rounded_up(wide.abs().amax(-1, keepdim=True) / (127 if form.name == "int8" else 448))
        codes = torch.nan_to_num(wide / scale)
        codes = codes.round().to(torch.int8) if form.name == "int8" else codes.to(torch.float8_e4m3fn)
    parts = parts.bfloat16().contiguous().view(torch.uint8)
    return torch.cat([codes.view(torch.uint8).flatten(1), parts.flatten(1)], dim=1)[:, None]


def _rounded_up(x: Tensor) -> Tensor:
    """To bfloat16 and back, away from zero where x is positive: codes then never exceed their range."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x > 0, bits + 0xFFFF, bits).bitwise_and(-0x10000).view(torch.float32)


def unpack_rows(
    rows: Tensor, form: PageFormat, kv_heads: int, width: int, dtype: torch.dtype, rotates: bool = False
) -> Tensor:
    """The keys or values of quantized rows.

    Args:
        rows: uint8 `[..., 1, bytes]`.
        form: See `PageFormat`.
        kv_heads: Heads of a row.
        width: Of a head.
        dtype: Of the result.
        rotates: They were multiplied by a Hadamard matrix.

    Returns:
        `[..., kv_heads, width]`.
    """
    size = kv_heads * width * form.bits // 8
    codes, parts = rows[..., 0, :size].contiguous(), rows[..., 0, size:].contiguous().view(torch.bfloat16).float()
    codes, parts = codes.unflatten(-1, (kv_heads, -1)), parts.unflatten(-1, (kv_heads, form.parts))
    if form.bits == 4:
        wide = torch.cat([codes & 15, codes >> 4], dim=-1) * parts[..., :1] + parts[..., 1:]
    else:
        wide = codes.view(torch.int8 if form.name == "int8" else torch.float8_e4m3fn).float() * parts
    return (hadamard(wide) if rotates else wide).to(dtype)
