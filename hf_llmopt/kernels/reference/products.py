"""Products with dense and with quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Grid


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias`, rounded to the dtype, plus `residual`.

    Args:
        x: `[..., inputs]`.
        weight: `[outputs, inputs]`.
        bias: `[outputs]`, or `None`.
        residual: `[..., outputs]`, or `None`.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def dequantize(grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `[outputs, inputs]` that a grid stands for: computed in float32, rounded once.

    Example:
        >>> import torch
        >>> from hf_llmopt.kernels.arguments import Grid
        >>> dequantize(Grid(torch.tensor([[8, 9, 0, 15]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]])))
        tensor([[  0.0000,   0.5000, -16.0000,  14.0000]])
    """
    codes, scales, zeros, bits, index = grid
    if index is None:
        inputs, groups = codes.shape[1], scales.shape[1]
        index = torch.arange(inputs, device=codes.device) // (inputs // groups)
    index = index.long()
    offset = 0 if codes.is_floating_point() else 2 ** (bits - 1) if zeros is None else zeros.float()[:, index]
    return ((codes.float() - offset) * scales.float()[:, index]).to(dtype)


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Activations as int8, a scale for each row and group of inputs: `x ~ codes * scales`, round half to even.

    Args:
        x: `[rows, inputs]`.
        group: Inputs that share a scale; divides `inputs`.

    Returns:
        int8 `[rows, inputs]` within -127 and 127, and float32 `[rows, inputs / group]`.
    """
    grouped = x.float().unflatten(-1, (-1, group))
    scales = grouped.abs().amax(-1).clamp_min(1e-9) / 127
    return torch.round(grouped / scales[..., None]).clamp(-127, 127).flatten(-2).to(torch.int8), scales


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as float8_e4m3fn, a scale for each row: `x ~ codes * scales`; 448 is the largest code.

    Args:
        x: `[rows, inputs]`.

    Returns:
        float8_e4m3fn `[rows, inputs]` and float32 `[rows, 1]`.
    """
    scales = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-9) / 448
    return (x.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def quantized_linear(
    x: Tensor, grid: Grid, bias: Tensor | None = None, residual: Tensor | None = None, group: int = 0
) -> Tensor:
    """`x @ w^T + bias`, rounded to x's dtype, plus `residual`, where a grid stands for w.

    Args:
        x: `[..., inputs]`.
        grid: The weight, `[outputs, inputs]`.
        bias: `[outputs]`, or `None`.
        residual: `[..., outputs]`, or `None`.
        group: Inputs whose activations share an int8 scale, in the order in which the grid's groups have them; 0 leaves
            activations as they are.
    """
    wide = x.float().flatten(0, -2)
    if group:
        sort = None if grid.index is None else grid.index.argsort(stable=True)
        codes, scales = quantize_rows(wide if sort is None else wide[:, sort], group)
        near = codes.float() * scales.repeat_interleave(group, -1)
        wide = near if sort is None else torch.empty_like(near).index_copy_(1, sort, near)
    y = torch.nn.functional.linear(wide, dequantize(grid), None if bias is None else bias.float())
    y = y.to(x.dtype).view(*x.shape[:-1], -1)
    return y if residual is None else y + residual


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight + bias` with a weight kept as `[inputs, outputs]`, as GPT-2 does.

    Args:
        x: `[..., inputs]`.
        weight: `[inputs, outputs]`.
        bias: `[outputs]`, or `None`.
    """
    return torch.nn.functional.linear(x, weight.T, bias)
