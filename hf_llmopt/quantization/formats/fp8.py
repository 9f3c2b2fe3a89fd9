"""Weights in float8_e4m3fn with scales.

`float-quantized` of compressed-tensors has a scale for each output, for all, or for each block; the fine-grained `fp8`
of transformers and DeepSeek-V3 has blocks, mostly of 128 by 128, and calls the scale that is multiplied with
`weight_scale_inv`. Blocks at the edges may be smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arguments import Grid
from .scheme import Format, Layout, Scheme, divides, in_order, repeated, scale_shape, shared


def _format(name: str) -> Format:
    """The format that calls its scales `name`."""

    def layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
        shape = scale_shape(scheme, outputs, inputs)
        return {"weight": ((outputs, inputs), torch.float8_e4m3fn), name: (shape, dtype)}

    def pack(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weight": grid.codes.contiguous(), name: shared(grid.scales.to(dtype), scheme)}

    def unpack(stored: dict[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
        ragged = scheme.group_size != -1 and inputs % scheme.group_size
        index = in_order(scheme, inputs, stored["weight"].device) if ragged else None
        return Grid(stored["weight"], repeated(stored[name], scheme, outputs), None, 8, index)

    return Format(layout, pack, unpack, obstacle)


def obstacle(scheme: Scheme, outputs: int, inputs: int) -> str | None:
    """Why a weight does not fit, or `None`."""
    return divides(scheme, inputs) if scheme.rows == 1 else None


FLOAT = _format("weight_scale")
BLOCKS = _format("weight_scale_inv")
