"""AWQ files as AutoAWQ writes them: GEMM, and GEMV (awq/modules/linear/gemm.py and gemv.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arguments import Grid
from .bits import pack_bits, unpack_bits
from .scheme import Format, Layout, Scheme, divides, or_symmetric, whole_words, zeros_of


def obstacle(scheme: Scheme, outputs: int, inputs: int) -> str | None:
    """Why a weight does not fit, or `None`."""
    return divides(scheme, inputs) or whole_words(scheme, inputs, outputs)


def gemm_layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
    """Shapes and dtypes of the tensors of GEMM."""
    groups = scheme.groups(inputs)
    return {
        "qweight": ((inputs, outputs // 8), torch.int32),
        "qzeros": ((groups, outputs // 8), torch.int32),
        "scales": ((groups, outputs), dtype),
    }


def gemm_pack(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a grid in GEMM's layout: words along outputs, first the even ones of eight, then the odd ones."""
    return {
        "qweight": _interleaved(grid.codes.T),
        "qzeros": _interleaved(zeros_of(grid).T),
        "scales": grid.scales.to(dtype).T.contiguous(),
    }


def _interleaved(codes: Tensor) -> Tensor:
    """uint8 `[rows, outputs]` to words: outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight."""
    return pack_bits(codes.unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(1), 4)


def gemm_unpack(stored: dict[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
    """The grid of GEMM's tensors."""

    def columns(packed: Tensor) -> Tensor:
        codes = unpack_bits(packed, 4, outputs)  # [rows, outputs]
        return codes.unflatten(1, (-1, 2, 4)).permute(1, 3, 2, 0).flatten(0, 2).contiguous()  # [outputs, rows]

    return Grid(
        columns(stored["qweight"]),
        stored["scales"].T.contiguous(),
        or_symmetric(columns(stored["qzeros"]), scheme),
    )


def gemv_layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
    """Shapes and dtypes of the tensors of GEMV."""
    width = _width(scheme, inputs)
    return {
        "qweight": ((outputs, inputs // 8), torch.int32),
        "qzeros": ((outputs, width), torch.int32),
        "scales": ((outputs, width * 8), dtype),
    }


def _width(scheme: Scheme, inputs: int) -> int:
    """Words of a row of zeros: those that the groups need, rounded up for groups below 128."""
    multiple = max(1, 128 // (inputs if scheme.group_size == -1 else scheme.group_size))
    needed = -(-(scheme.groups(inputs)) // 8)
    return -(-needed // multiple) * multiple


def gemv_pack(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a grid in GEMV's layout: words along inputs, zeros and scales padded."""
    groups = grid.scales.shape[1]
    pad = _width(scheme, grid.codes.shape[1]) * 8 - groups
    zeros, scales = (torch.nn.functional.pad(t, (0, pad)) for t in (zeros_of(grid), grid.scales.to(dtype)))
    return {"qweight": pack_bits(grid.codes, 4), "qzeros": pack_bits(zeros, 4), "scales": scales}


def gemv_unpack(stored: dict[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
    """The grid of GEMV's tensors."""
    groups = scheme.groups(inputs)
    return Grid(
        unpack_bits(stored["qweight"], 4, inputs),
        stored["scales"][:, :groups].contiguous(),
        or_symmetric(unpack_bits(stored["qzeros"], 4, groups), scheme),
    )


def gemv_obstacle(scheme: Scheme, outputs: int, inputs: int) -> str | None:
    """Why a weight does not fit, or `None`."""
    size = inputs if scheme.group_size == -1 else scheme.group_size
    if size < 128 and size not in (32, 64):
        return f"its group size is {size}, and awq_gemv has 32, 64, and from 128 on"
    return obstacle(scheme, outputs, inputs)


GEMM = Format(gemm_layout, gemm_pack, gemm_unpack, obstacle)
GEMV = Format(gemv_layout, gemv_pack, gemv_unpack, gemv_obstacle)
