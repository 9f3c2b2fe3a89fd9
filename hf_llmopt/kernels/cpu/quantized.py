"""A quantized weight as `quantized.c` reads it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import reference
from ..arguments import Grid
from ..race import best_seconds
from . import ops

LANES, STEP = 16, 8  # outputs side by side; inputs that are always of one group
LARGEST = 128  # inputs that share an int8 scale at most, as in quantized.c
FOUR_BITS, EIGHT_BITS, FLOAT8 = 1, 2, 3  # as in linear.h
CHUNK = 1 << 22  # codes that are laid out at a time: little memory beside the weight
FEW = 16  # rows up to which a dense copy of the weight never pays
TRIED = 64  # rows with which it is measured whether it does
NO_LIMIT = 1 << 30
DENSE = 1 << 26  # elements of a weight of which no dense copy is made

_limits: dict[tuple[object, ...], int] = {}


class _Own(threading.local):
    """Whether this thread wants products whose rows do not depend on one another."""

    only = False


_own = _Own()


@contextmanager
def own_products() -> Iterator[None]:
    """Multiply any number of rows with our kernels, so that a row's result never depends on others."""
    former, _own.only = _own.only, True
    try:
        yield
    finally:
        _own.only = former


class BlockedWeight:
    """A grid in blocks of 16 outputs, codes of up to 4 bits two a byte.

    Args:
        grid: On the CPU. Groups may have different numbers of inputs.

    Attributes:
        tensors: `codes`, `scales`, and where the grid needs them `zeros` and `order`, the places of the inputs.
        outputs: Rows of the weight.
        inputs: Its columns.
        share: How many inputs share a scale where activations are rounded to int8; 0 for float8 codes, whose
            activations are not rounded.

    Example:
        >>> import torch
        >>> from hf_llmopt.kernels import cpu
        >>> from hf_llmopt.kernels.arguments import Grid
        >>> grid = Grid(torch.randint(16, (32, 64), dtype=torch.uint8), torch.rand(32, 2))
        >>> weight = BlockedWeight.pack(grid) if cpu.available() else None
        >>> weight is None or torch.equal(weight.unpack().codes, grid.codes)
        True
    """

    def __init__(self, grid: Grid) -> None:
        codes, scales, zeros, bits, index = grid
        self.outputs, self.inputs = codes.shape
        self.groups = scales.shape[1]
        self.bits = bits
        self.is_indexed = index is not None
        self.kind = FLOAT8 if codes.is_floating_point() else FOUR_BITS if bits <= 4 else EIGHT_BITS
        order = _order(self.inputs, self.groups, index)
        self.laid = self.inputs if order is None else len(order)
        self.share = 0 if self.kind == FLOAT8 else _divisor(self.laid // self.groups)
        self._told: dict[int, tuple[int, tuple[int | float, ...]]] = {}
        self.tensors = {"codes": self._codes(codes.view(torch.uint8), order), "scales": _lanes(scales.float())}
        if zeros is not None:
            self.tensors["zeros"] = _lanes(zeros)
        if order is not None:
            self.tensors["order"] = order

    @classmethod
    def pack(cls, grid: Grid) -> BlockedWeight | None:
        """The grid in this layout; `None` if the kernels are not built or it lies elsewhere.

        Args:
            grid: Codes of up to 8 bits, or float8_e4m3fn.
        """
        fits = grid.codes.dtype in (torch.uint8, torch.float8_e4m3fn) and grid.bits <= 8
        return cls(grid) if fits and ops.available() and grid.codes.device.type == "cpu" else None

    def unpack(self) -> Grid:
        """The same grid, its scales in float32."""
        tensors = self.tensors
        order = tensors.get("order")
        codes = torch.empty(self.outputs, self.inputs, dtype=torch.uint8, device="cpu")
        for blocks, laid in self._unpacked():
            rows = codes[blocks * LANES : blocks * LANES + len(laid)]
            laid = laid[: len(rows)]
            if order is None:
                rows.copy_(laid)
            else:
                rows[:, order[order >= 0].long()] = laid[:, order >= 0]
        index = None
        if self.is_indexed and order is not None:
            index = torch.empty(self.inputs, dtype=torch.int32, device="cpu")
            groups = torch.arange(self.laid, dtype=torch.int32, device="cpu") // (self.laid // self.groups)
            index[order[order >= 0].long()] = groups[order >= 0]
        zeros = self._rows(tensors["zeros"]) if "zeros" in tensors else None
        kept = codes.view(torch.float8_e4m3fn) if self.kind == FLOAT8 else codes
        return Grid(kept, self._rows(tensors["scales"]), zeros, self.bits, index)

    def product(self, x: Tensor, bias: Tensor | None = None, *, activations: bool = True) -> Tensor:
        """`x @ w^T + bias`.

        Args:
            x: `[..., inputs]`.
            bias: `[outputs]`, or `None`.
            activations: Activations may be rounded to int8.
        """
        if x.dtype not in ops.DTYPES:
            return self.product(x.float(), bias, activations=activations).to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        group, rows = self.share if activations else 0, x.numel() // self.inputs
        if rows > FEW and not _own.only and rows > self.own_rows(x.dtype, group):
            return linear(self.rounded(x, group), ops.dequantize(self, x.dtype), bias)
        return ops.quantized_linear(x.contiguous(), self, bias, group=group)

    def rounded(self, x: Tensor, group: int) -> Tensor:
        """What the kernel multiplies: which product is faster must not decide whether activations are rounded.

        Args:
            x: `[..., inputs]`.
            group: Inputs whose activations share an int8 scale, or 0 for x itself.
        """
        if not group:
            return x
        rows, order = x.reshape(-1, self.inputs), self.tensors.get("order")
        laid = rows if order is None else torch.where(order >= 0, rows[:, order.clamp_min(0).long()], 0)
        codes, scales = reference.quantize_rows(laid, group)
        found = (codes.unflatten(1, (-1, group)) * scales[..., None]).flatten(1).to(x.dtype)
        if order is not None:
            laid, found = found, torch.empty_like(rows)
            found[:, order[order >= 0].long()] = laid[:, order >= 0]
        return found.view(x.shape)

    def own_rows(self, dtype: torch.dtype, group: int) -> int:
        """Rows up to which this kernel is faster than torch's product with a dense copy; measured once per shape.

        Args:
            dtype: Of the activations.
            group: Inputs whose activations share an int8 scale, or 0.
        """
        key = (
            self.outputs, self.laid, self.groups, self.kind, *self.tensors, dtype, group,
            torch.get_num_threads(), ops.used(),
        )  # fmt: skip
        if key not in _limits:
            if self.outputs * self.inputs > DENSE:
                return NO_LIMIT
            x = torch.ones(TRIED, self.inputs, dtype=dtype, device="cpu")
            dense = ops.dequantize(self, dtype)
            ours, theirs, made = best_seconds(
                [
                    lambda: ops.quantized_linear(x, self, group=group),
                    lambda: linear(self.rounded(x, group), dense),
                    lambda: ops.dequantize(self, dtype),
                ],
                rounds=3,
            )
            # rows * ours / TRIED = rows * theirs / TRIED + made
            _limits[key] = int(TRIED * made / (ours - theirs)) if ours > theirs else NO_LIMIT
        return _limits[key]

    def rows(self, start: int, stop: int) -> BlockedWeight:
        """The outputs `[start, stop)`, which share memory with the whole.

        Raises:
            ValueError: They do not begin and end between blocks.
        """
        if start % LANES or (stop % LANES and stop != self.outputs):
            raise ValueError(f"outputs {start} to {stop} are not whole blocks of {LANES}")
        part = copy.copy(self)
        part.outputs = stop - start
        part.tensors = {
            name: tensor if name == "order" else tensor[start // LANES : -(-stop // LANES)]
            for name, tensor in self.tensors.items()
        }
        return part

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[outputs, inputs]`."""
        return ops.dequantize(self, dtype) if dtype in ops.DTYPES else ops.dequantize(self, torch.float32).to(dtype)

    def numbers(self, group: int) -> tuple[int | float, ...]:
        """What C is told of the weight besides its address and shape.

        Args:
            group: Inputs whose activations share an int8 scale, or 0.
        """
        address = self.tensors["codes"].data_ptr()
        if self._told.get(group, (0,))[0] != address:  # sharing memory with another process moves tensors, all of them
            zeros, order = self.tensors.get("zeros"), self.tensors.get("order")
            self._told[group] = address, (
                self.kind, self.tensors["scales"].data_ptr(), 0 if zeros is None else zeros.data_ptr(),
                0 if order is None else order.data_ptr(), 2.0 ** (self.bits - 1),
                self.laid, self.laid // self.groups, group,
            )  # fmt: skip
        return self._told[group][1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_told": {}}  # a copy has tensors of its own

    def _codes(self, codes: Tensor, order: Tensor | None) -> Tensor:
        """`[blocks, laid / 8, 64]` (two codes a byte) or `[blocks, laid / 4, 64]`."""
        halves = 2 if self.kind == FOUR_BITS else 1
        blocks = -(-self.outputs // LANES)
        packed = torch.empty(blocks, self.laid // (4 * halves), 64, dtype=torch.uint8, device="cpu")
        at_once = max(1, CHUNK // (LANES * self.laid))
        for first in range(0, blocks, at_once):
            rows = codes[first * LANES : (first + at_once) * LANES]
            if order is not None:
                rows = torch.where(order >= 0, rows[:, order.clamp_min(0).long()], 0)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % LANES))
            split = rows.view(-1, LANES, packed.shape[1], halves, 4)
            bytes_ = split[..., 0, :] | split[..., 1, :] << 4 if halves == 2 else split[..., 0, :]
            packed[first : first + at_once] = bytes_.transpose(1, 2).flatten(2)
        return packed

    def _unpacked(self) -> Iterator[tuple[int, Tensor]]:
        """Codes as they are laid out, `[outputs, laid]`, some blocks at a time, and the first block of each."""
        packed = self.tensors["codes"]
        at_once = max(1, CHUNK // (LANES * self.laid))
        for first in range(0, len(packed), at_once):
            bytes_ = packed[first : first + at_once].unflatten(2, (LANES, 4)).transpose(1, 2)
            split = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-2) if self.kind == FOUR_BITS else bytes_
            yield first, split.reshape(-1, self.laid)

    def _rows(self, lanes: Tensor) -> Tensor:
        """`[blocks, groups, 16]` as `[outputs, groups]`."""
        return lanes.transpose(1, 2).flatten(0, 1)[: self.outputs].contiguous()


def _lanes(values: Tensor) -> Tensor:
    """`[outputs, groups]` as `[blocks, groups, 16]`."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % LANES))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _order(inputs: int, groups: int, index: Tensor | None) -> Tensor | None:
    """Which input stands at which place, int32: groups one after the other, filled up to steps by -1."""
    if index is None and inputs % groups == 0 and inputs // groups % STEP == 0:
        return None
    if index is None:
        index = torch.arange(inputs, device="cpu") // (inputs // groups)
    index = index.long()
    counts = index.bincount(minlength=groups)
    width = -(-int(counts.max()) // STEP) * STEP
    sort = index.argsort(stable=True)
    places = torch.arange(inputs, device="cpu") - (counts.cumsum(0) - counts)[index[sort]]
    order = torch.full((groups, width), -1, dtype=torch.int32, device="cpu")
    order[index[sort], places] = sort.int()
    return order.flatten()


def _divisor(group: int) -> int:
    """The largest part of a group that may share a scale."""
    return next(size for size in range(min(group, LARGEST), 0, -1) if group % size == 0 and size % STEP == 0)
