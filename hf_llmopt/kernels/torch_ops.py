"""Quantized products by torch's own operators: where our kernels cannot run, or cannot hold a grid.

Two of torch's operators are fast, and only in bfloat16: `_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm`. They
read scales in bfloat16; what the file said is kept beside them, so that nothing is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import reference
from .arguments import Grid

BF16 = torch.bfloat16
FOUR_BIT_GROUPS = (32, 64, 128, 256)  # what the operator takes
FOUR_BIT_OUTPUTS = 64  # of a block of its layout


def kernels(device: str) -> list[Any]:
    """The layouts to try on a kind of device, the best first; the last takes every grid."""
    return [Int4Weight, Int8Weight, PlainWeight] if device == "cpu" else [PlainWeight]


class PlainWeight:
    """Codes as small as bytes allow, and a dense weight made for every product."""

    def __init__(self, grid: Grid) -> None:
        codes, scales, zeros, self._bits, index = grid
        self._shape = codes.shape
        self._halves = grid.bits <= 4 and codes.shape[1] % 2 == 0
        if self._halves:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        self.tensors = {"codes": codes.contiguous(), "scales": scales.contiguous()}
        self.tensors |= {n: t.contiguous() for n, t in (("zeros", zeros), ("index", index)) if t is not None}

    @classmethod
    def pack(cls, grid: Grid) -> PlainWeight:  # noqa: D102 - see KernelWeight
        return cls(grid)

    def unpack(self) -> Grid:  # noqa: D102
        codes = self.tensors["codes"]
        if self._halves:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(self._shape)
        return Grid(codes, self.tensors["scales"], self.tensors.get("zeros"), self._bits, self.tensors.get("index"))

    def product(self, x: Tensor, bias: Tensor | None = None, *, activations: bool = True) -> Tensor:  # noqa: D102
        return linear(x, self.dequantize(x.dtype), bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return reference.dequantize(self.unpack(), dtype)


class Int8Weight:
    """One scale for each output, and codes around 128."""

    def __init__(self, grid: Grid) -> None:
        self.tensors = {"codes": (grid.codes.view(torch.int8) ^ -128).contiguous(), "scales": grid.scales.contiguous()}
        self._near = grid.scales.flatten().to(BF16)

    @classmethod
    def pack(cls, grid: Grid) -> Int8Weight | None:  # noqa: D102 - see KernelWeight
        plain = grid.bits == 8 and grid.codes.dtype is torch.uint8 and grid.zeros is None and grid.scales.shape[1] == 1
        return cls(grid) if plain else None

    def unpack(self) -> Grid:  # noqa: D102
        return Grid((self.tensors["codes"] ^ -128).view(torch.uint8), self.tensors["scales"], None, 8)

    def product(self, x: Tensor, bias: Tensor | None = None, *, activations: bool = True) -> Tensor:  # noqa: D102
        if x.dtype is not BF16 or not activations:
            return linear(x, self.dequantize(x.dtype), bias)
        y = torch._weight_int8pack_mm(x.flatten(0, -2).contiguous(), self.tensors["codes"], self._near)
        return _finish(y, x, bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return (self.tensors["codes"].float() * self.tensors["scales"].float()).to(dtype)


class Int4Weight:
    """Torch's layout of 4-bit codes, which differs between processors and is never written to a file."""

    def __init__(self, grid: Grid) -> None:
        codes, scales, zeros, self._bits, _ = grid
        self._outputs, self._inputs = codes.shape
        self._group = self._inputs // scales.shape[1]
        middle = 2 ** (self._bits - 1)
        offset = torch.full_like(scales, middle) if zeros is None else zeros.to(scales.dtype)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        # the operator computes (code - 8) * scale + zero
        near = torch.stack([scales.float().T, ((8 - offset.float()) * scales.float()).T], dim=-1)
        self.tensors = {"codes": packed, "near": near.to(BF16).contiguous(), "scales": scales.contiguous()}
        if zeros is not None:
            self.tensors["zeros"] = zeros.contiguous()

    @classmethod
    def pack(cls, grid: Grid) -> Int4Weight | None:  # noqa: D102 - see KernelWeight
        outputs, inputs = grid.codes.shape
        group = inputs // grid.scales.shape[1]
        fits = grid.bits <= 4 and grid.index is None and group in FOUR_BIT_GROUPS and outputs % FOUR_BIT_OUTPUTS == 0
        return cls(grid) if fits and inputs % group == 0 else None

    def unpack(self) -> Grid:  # noqa: D102
        # The layout is torch's own. Multiplied by the identity it shows its codes: whole numbers below 16, which
        # bfloat16 holds.
        ones = torch.ones(self._inputs // self._group, self._outputs, dtype=BF16, device="cpu")
        near = torch.stack([ones, 8 * ones], dim=-1)
        codes = torch.empty(self._outputs, self._inputs, dtype=torch.uint8, device="cpu")
        for first in range(0, self._inputs, self._group):
            rows = torch.zeros(self._group, self._inputs, dtype=BF16, device="cpu")
            rows[:, first : first + self._group].fill_diagonal_(1)
            codes[:, first : first + self._group] = self._multiply(rows, near).T.to(torch.uint8)
        return Grid(codes, self.tensors["scales"], self.tensors.get("zeros"), self._bits)

    def product(self, x: Tensor, bias: Tensor | None = None, *, activations: bool = True) -> Tensor:  # noqa: D102
        if x.dtype is not BF16 or not activations:
            return linear(x, self.dequantize(x.dtype), bias)
        return _finish(self._multiply(x.flatten(0, -2).contiguous(), self.tensors["near"]), x, bias)

    def _multiply(self, x: Tensor, near: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.tensors["codes"], self._group, near)

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return reference.dequantize(self.unpack(), dtype)


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias
