"""Grids: which numbers the weights of a group may become, and rounding to the nearest of them.

A group of weights w shares a scale s and an integer zero z, and becomes `s * (q - z)` with codes `0 <= q < 2**bits`.
The scale is rounded to the format it is stored in before codes are chosen: the codes are right for the scale that a
reader finds.

Symmetric grids have `z = 2**(bits - 1)`, so one code more below than above. The sign of the scale is free, and chosen
so that the side of the larger weights has it: with 3 and 4 bits this takes a tenth off the squared error of groups of
64 normal weights, and no reader needs to know.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UnsupportedQuantization
from ..kernels.arguments import Grid

CHUNK = 1 << 18  # weights that are worked on at once: they stay in the cache, and the memory is bounded
GPU_CHUNK = 1 << 24  # likewise on a GPU, whose launches would cost more than its work
SHRINK = 0.95  # a range that is tried, as a share of the one tried before
REFITS = 2  # least-squares scales for the codes of the best range


@torch.no_grad()
def make_grid(
    weight: Tensor,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> Grid:
    """Round a weight to nearest (RTN).

    Args:
        weight: `[outputs, inputs]`.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale, a divisor of `inputs`; -1 for all.
        symmetric: No zeros.
        clip: Search the range of each group for the least squared error.
        scale_dtype: What scales are stored in.

    Raises:
        UnsupportedQuantization: The weight has NaN or infinite elements.

    Example:
        >>> import torch
        >>> from hf_llmopt.kernels.reference import dequantize
        >>> grid = make_grid(torch.tensor([[0.7, -0.8, 0.1, 0.0]]), bits=4)
        >>> grid.codes.tolist(), dequantize(grid).allclose(torch.tensor([[0.7, -0.8, 0.1, 0.0]]), atol=1e-3)
        ([[15, 0, 9, 8]], True)
    """
    outputs, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(outputs, inputs // size, dtype=scale_dtype, device=weight.device)
    zeros = None if symmetric else torch.empty_like(scales, dtype=torch.uint8)
    rows = max(1, (CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // inputs)
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        grouped = weight[part].float().unflatten(1, (-1, size))
        scale, zero = find_range(grouped, bits, symmetric, clip, scale_dtype)
        codes[part] = round_to(grouped, scale[..., None], zero[..., None], bits, symmetric).flatten(1)
        scales[part] = scale
        if zeros is not None:
            zeros[part] = zero
    return Grid(codes, scales, zeros, bits)


@torch.no_grad()
def make_float8_grid(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> Grid:
    """Cast a weight to float8_e4m3fn, each output with a scale that brings its largest weight to 448.

    Args:
        weight: `[outputs, inputs]`.
        scale_dtype: What scales are stored in.

    Raises:
        UnsupportedQuantization: The weight has NaN or infinite elements.

    Example:
        >>> import torch
        >>> make_float8_grid(torch.tensor([[1.0, -2.0]])).codes.float().tolist()
        [[224.0, -448.0]]
    """
    wide = weight.float()
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = _storable(_finite(wide.abs().amax(1, keepdim=True)) / largest, scale_dtype)
    codes = (wide / scales).clamp_(-largest, largest).to(torch.float8_e4m3fn)
    return Grid(codes, scales.to(scale_dtype), None, 8)


@torch.no_grad()
def find_range(
    weight: Tensor,
    bits: int,
    symmetric: bool,
    clip: bool,
    scale_dtype: torch.dtype = torch.float16,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, with the least squared error or, without `clip`, the largest weight in range.

    Shrunken ranges are tried; for the codes of the best one the scale is the least-squares one,
    `sum(w (q - z)) / sum((q - z)**2)`.

    Args:
        weight: `[..., size]`, float32; each row a group.
        bits: 2, 3, 4 or 8.
        symmetric: `z = 2**(bits - 1)`.
        clip: Search.
        scale_dtype: What scales are stored in.
        importance: Factor on the squared error of each weight, `[..., size]`, broadcast.

    Returns:
        Scales, representable in `scale_dtype`, and zeros, both float32 `[...]`.

    Raises:
        UnsupportedQuantization: The weight has NaN or infinite elements.
    """
    # [size, groups]: each operation runs over long rows, which is several times as fast as over short groups.
    columns = weight.flatten(0, -2).T.contiguous()
    heavy = None if importance is None else importance.expand(weight.shape).flatten(0, -2).T.contiguous()
    first, last = _ends(bits, symmetric)
    whole, zero = _whole_range(columns, bits, symmetric)
    scale = _storable(whole, scale_dtype)
    if clip:
        buffers = torch.empty_like(columns), torch.empty_like(columns)
        best = _error(columns, scale, zero, first, last, heavy, buffers)

        def attempt(trial: Tensor) -> None:
            trial = _storable(trial, scale_dtype)
            error = _error(columns, trial, zero, first, last, heavy, buffers)
            torch.where(error < best, trial, scale, out=scale)
            torch.minimum(error, best, out=best)

        for share in _shares(weight.shape[-1], bits):
            attempt(whole * share)
        for _ in range(REFITS):
            near = round_to(columns, scale, zero, bits, symmetric).sub_(zero)
            weighted = near if heavy is None else near * heavy
            square = (near * weighted).sum(0)
            attempt(torch.where(square > 0, (columns * weighted).sum(0) / square, scale))
    return scale.view(weight.shape[:-1]), zero.view(weight.shape[:-1])


def _whole_range(columns: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros that have all weights of a group in range, both `[groups]`; `columns` is `[size, groups]`."""
    low, high = columns.amin(0).clamp_(max=0), columns.amax(0).clamp_(min=0)
    _finite(high - low)
    first, last = _ends(bits, symmetric)
    if not symmetric:
        scale = (high - low) / last
        return scale, (-low / scale.masked_fill(scale == 0, 1)).round_().clamp_(0, last)
    middle = 2 ** (bits - 1)
    # The longer side gets the codes below the middle, where there are more of them.
    long, short = torch.maximum(high, -low), torch.minimum(high, -low)
    scale = torch.maximum(long / (middle - first), short / (last - middle))
    return scale.where((high <= -low) | (first > 0), -scale), torch.full_like(scale, middle)


def _shares(size: int, bits: int) -> list[float]:
    """Which ranges to try, as shares of the whole one.

    With one weight of 1 among `size - 1` of which nothing is known but that rounding costs `s**2 / 12` each, the least
    error is at a range of `1 / (1 + size / (3 * 4**bits))`; with several large weights it is somewhat lower.
    """
    lowest = 0.7 / (1 + size / (3 * 4**bits))
    return [SHRINK**step for step in range(1, math.ceil(math.log(lowest, SHRINK)) + 1)]


def round_to(weight: Tensor, scales: Tensor, zeros: Tensor | float, bits: int, symmetric: bool) -> Tensor:
    """The nearest codes, in float32.

    Args:
        weight: Any shape, float32.
        scales: Broadcast against `weight`.
        zeros: Likewise.
        bits: 2, 3, 4 or 8.
        symmetric: Symmetric codes of 8 bits leave the lowest free, so that they fit int8 kernels.
    """
    return (weight / scales).round_().add_(zeros).clamp_(*_ends(bits, symmetric))


def _ends(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and highest code."""
    return int(symmetric and bits == 8), 2**bits - 1


def _error(
    columns: Tensor,
    scale: Tensor,
    zero: Tensor,
    first: int,
    last: int,
    importance: Tensor | None,
    buffers: tuple[Tensor, Tensor],
) -> Tensor:
    """The squared error of each group, `[groups]`; the others as in `find_range`, `[size, groups]`."""
    exact, near = buffers
    torch.mul(columns, scale.reciprocal(), out=exact)
    torch.round(exact, out=near).clamp_(first - zero, last - zero)
    square = exact.sub_(near).square_()
    return (square if importance is None else square.mul_(importance)).sum(0) * scale.square()


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to a format, still in float32. A group whose scale is 0 there has only zeros: any scale does."""
    limit = torch.finfo(dtype).max
    rounded = scale.clamp(-limit, limit).to(dtype).float()
    return rounded.masked_fill_(rounded == 0, 1)


def _finite(spread: Tensor) -> Tensor:
    if not spread.isfinite().all():
        raise UnsupportedQuantization("A weight has NaN or infinite elements. Check the checkpoint it came from.")
    return spread
