"""GPTQ files: `qweight`, `qzeros`, `scales`, `g_idx`, as AutoGPTQ (version 1) and GPTQModel (version 2) write them.

Version 1 stores each zero less one, version 2 as it is. GPTQModel makes one of the other by adding to whole words, so
that a zero of 0 borrows from the next one in the word; with three bits, where zeros straddle words, by adding to each
zero modulo 8 (gptqmodel/utils/model.py, `convert_gptq_v1_to_v2_format_module`). Both are undone here the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arguments import Grid
from .bits import pack_bits, unpack_bits, words
from .scheme import Format, Layout, Scheme, divides, in_order, index_of, or_symmetric, whole_words, zeros_of


def obstacle(scheme: Scheme, outputs: int, inputs: int) -> str | None:
    """Why a weight does not fit, or `None`."""
    return divides(scheme, inputs) or whole_words(scheme, inputs, outputs)


def layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
    """Shapes and dtypes of the tensors."""
    groups = scheme.groups(inputs)
    return {
        "qweight": ((words(inputs, scheme.bits), outputs), torch.int32),
        "qzeros": ((groups, words(outputs, scheme.bits)), torch.int32),
        "scales": ((groups, outputs), dtype),
        "g_idx": ((inputs,), torch.int32),
    }


def pack(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a grid."""
    bits, inputs = scheme.bits, grid.codes.shape[1]
    index = in_order(scheme, inputs, grid.codes.device) if grid.index is None else grid.index
    zeros = pack_bits(zeros_of(grid).T, bits)
    if scheme.format == "gptq":
        zeros = _moved(zeros, -1, bits, grid.codes.shape[0])
    return {
        "qweight": pack_bits(grid.codes, bits).T.contiguous(),
        "qzeros": zeros,
        "scales": grid.scales.to(dtype).T.contiguous(),
        "g_idx": index.to(torch.int32),
    }


def unpack(stored: dict[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
    """The grid of the tensors."""
    bits = scheme.bits
    zeros = stored["qzeros"] if is_v2(stored["qzeros"], scheme, outputs) else _moved(stored["qzeros"], 1, bits, outputs)
    return Grid(
        unpack_bits(stored["qweight"].T, bits, inputs),
        stored["scales"].T.contiguous(),
        or_symmetric(unpack_bits(zeros, bits, outputs).T.contiguous(), scheme),
        bits,
        index_of(stored.get("g_idx"), scheme, inputs),
    )


def is_v2(qzeros: Tensor, scheme: Scheme, outputs: int) -> bool:
    """Whether zeros are stored as they are.

    Symmetric files have one zero, `2**(bits - 1)`, and say so themselves: it is stored, or one less. The field
    `checkpoint_format` decides only where the zeros do not, as tools have written version 2 and called it `gptq`
    (vllm-project/vllm#38966).
    """
    if scheme.symmetric:
        zeros, middle = unpack_bits(qzeros, scheme.bits, outputs), 2 ** (scheme.bits - 1)
        for stored, answer in ((middle, True), (middle - 1, False)):
            if bool((zeros == stored).all()):
                return answer
    return scheme.format == "gptq_v2"


def _moved(qzeros: Tensor, by: int, bits: int, outputs: int) -> Tensor:
    """Packed zeros plus `by`."""
    if bits == 3:
        return pack_bits(unpack_bits(qzeros, bits, outputs) + by & 7, bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    return (qzeros.long() + by * ones).to(torch.int32)  # wraps around, without overflow on the way


FORMAT = Format(layout, pack, unpack, obstacle)
