"""Integers as compressed-tensors stores them: `pack-quantized` and `int-quantized`.

Codes are signed there, `code - 2**(bits - 1)`. Packed, the offset is added again, so that the words are those of this
package; see compressed_tensors/compressors/pack_quantized/helpers.py and naive_quantized/base.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InvalidCheckpoint
from ...kernels.arguments import Grid
from .bits import pack_bits, unpack_bits, words
from .scheme import Format, Layout, Scheme, divides, index_of, repeated, scale_shape, shared, zeros_of


def obstacle(scheme: Scheme, outputs: int, inputs: int) -> str | None:
    """Why a weight does not fit, or `None`."""
    return divides(scheme, inputs)


def _index_layout(scheme: Scheme, inputs: int) -> Layout:
    return {"weight_g_idx": ((inputs,), torch.int32)} if scheme.act_order else {}


def packed_layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
    """Shapes and dtypes of the tensors of `pack-quantized`; zeros are packed along outputs."""
    scales = scale_shape(scheme, outputs, inputs)
    zeros = (scales, torch.int8) if scheme.rows == -1 else ((words(outputs, scheme.bits), scales[1]), torch.int32)
    return {
        "weight_packed": ((outputs, words(inputs, scheme.bits)), torch.int32),
        "weight_scale": (scales, dtype),
        "weight_shape": ((2,), torch.int64),
        **({} if scheme.symmetric else {"weight_zero_point": zeros}),
        **_index_layout(scheme, inputs),
    }


def pack_packed(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a grid as `pack-quantized`."""
    stored = {
        "weight_packed": pack_bits(grid.codes, scheme.bits),
        "weight_scale": shared(grid.scales.to(dtype), scheme),
        "weight_shape": torch.tensor(grid.codes.shape, device=grid.codes.device),
    }
    if not scheme.symmetric:
        zeros = zeros_of(grid)
        along_outputs = scheme.rows != -1  # one zero for all is not packed
        packed = pack_bits(zeros.T, scheme.bits).T.contiguous() if along_outputs else _signed(zeros, scheme)
        stored["weight_zero_point"] = packed
    return stored | _index(grid, scheme)


def unpack_packed(stored: dict[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
    """The grid of the tensors of `pack-quantized`."""
    shape = stored["weight_shape"].tolist() if "weight_shape" in stored else [outputs, inputs]
    if shape != [outputs, inputs]:
        raise InvalidCheckpoint(f"weight_shape says {shape}, and the model wants {[outputs, inputs]}")
    zeros = None
    if not scheme.symmetric:
        kept = stored["weight_zero_point"]
        zeros = _unsigned(kept, scheme, outputs) if scheme.rows == -1 else unpack_bits(kept.T, scheme.bits, outputs).T
    return Grid(
        unpack_bits(stored["weight_packed"], scheme.bits, inputs),
        repeated(stored["weight_scale"], scheme, outputs),
        None if zeros is None else zeros.contiguous(),
        scheme.bits,
        index_of(stored.get("weight_g_idx"), scheme, inputs),
    )


def plain_layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
    """Shapes and dtypes of the tensors of `int-quantized`: a code is a byte."""
    scales = scale_shape(scheme, outputs, inputs)
    return {
        "weight": ((outputs, inputs), torch.int8),
        "weight_scale": (scales, dtype),
        **({} if scheme.symmetric else {"weight_zero_point": (scales, torch.int8)}),
        **_index_layout(scheme, inputs),
    }


def pack_plain(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a grid as `int-quantized`."""
    stored = {
        "weight": (grid.codes - 2 ** (scheme.bits - 1)).view(torch.int8),
        "weight_scale": shared(grid.scales.to(dtype), scheme),
    }
    if not scheme.symmetric:
        stored["weight_zero_point"] = _signed(zeros_of(grid), scheme)
    return stored | _index(grid, scheme)


def unpack_plain(stored: dict[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
    """The grid of the tensors of `int-quantized`."""
    codes = stored["weight"].view(torch.uint8) + 2 ** (scheme.bits - 1)
    if scheme.bits < 8 and int(codes.max()) >> scheme.bits:
        raise InvalidCheckpoint(f"weight has codes of more than {scheme.bits} bits")
    return Grid(
        codes,
        repeated(stored["weight_scale"], scheme, outputs),
        None if scheme.symmetric else _unsigned(stored["weight_zero_point"], scheme, outputs),
        scheme.bits,
        index_of(stored.get("weight_g_idx"), scheme, inputs),
    )


def _signed(zeros: Tensor, scheme: Scheme) -> Tensor:
    """Zeros `[outputs, groups]` to int8, as the scales are shaped."""
    return shared((zeros - 2 ** (scheme.bits - 1)).view(torch.int8), scheme)


def _unsigned(stored: Tensor, scheme: Scheme, outputs: int) -> Tensor:
    """Undoes `_signed`."""
    return repeated(stored.view(torch.uint8) + 2 ** (scheme.bits - 1), scheme, outputs)


def _index(grid: Grid, scheme: Scheme) -> dict[str, Tensor]:
    """`weight_g_idx` of a scheme with act-order; -1, as compressed-tensors has it, where inputs are in order."""
    if not scheme.act_order:
        return {}
    inputs, device = grid.codes.shape[1], grid.codes.device
    unfilled = torch.full((inputs,), -1, dtype=torch.int32, device=device)
    return {"weight_g_idx": unfilled if grid.index is None else grid.index.to(torch.int32)}


PACKED = Format(packed_layout, pack_packed, unpack_packed, obstacle)
PLAIN = Format(plain_layout, pack_plain, unpack_plain, obstacle)
