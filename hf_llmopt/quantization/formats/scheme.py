"""How one weight is stored: the format of the file, and what it says about the codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import OWN
from ...errors import InvalidCheckpoint, UnsupportedQuantization
from ...kernels.arguments import Grid

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor that a weight stores

# The bits that each format can hold.
BITS = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "awq": (4,),
    "awq_gemv": (4,),
    "pack-quantized": (2, 3, 4, 8),
    "int-quantized": (2, 3, 4, 8),
    "float-quantized": (8,),
    "fp8": (8,),
}


@dataclass(frozen=True)
class Scheme:
    """How the weight of a linear layer is stored.

    Args:
        format: `"gptq"` (version 1), `"gptq_v2"`, `"awq"` (GEMM), `"awq_gemv"`; `"pack-quantized"`, `"int-quantized"`,
            `"float-quantized"` of compressed-tensors; `"fp8"`, the blocks of transformers' fine-grained fp8; or a name
            of `hf_llmopt.register`.
        bits: Of a code.
        group_size: Inputs that share a scale; -1 for all.
        symmetric: No zeros are stored, or all stand in the middle.
        act_order: Inputs belong to groups in another order than their own.
        activations: The file asks for activations in eight bits too.
        rows: Outputs that share a scale; -1 for all.

    Raises:
        UnsupportedQuantization: No such format, or not with these bits, groups or rows.

    Example:
        >>> Scheme("gptq", bits=4, group_size=128, symmetric=True).groups(4096)
        32
    """

    format: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False
    activations: bool = False
    rows: int = 1

    def __post_init__(self) -> None:
        known = BITS | dict.fromkeys(OWN["format"], (2, 3, 4, 8))
        if self.format not in known:
            raise UnsupportedQuantization(f"The format {self.format!r} cannot be read. These can: {', '.join(known)}.")
        if self.bits not in known[self.format]:
            allowed = ", ".join(map(str, known[self.format]))
            raise UnsupportedQuantization(f"{self.format} with {self.bits!r} bits cannot be read, only with {allowed}.")
        for name, value in (("group size", self.group_size), ("outputs of a scale", self.rows)):
            if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
                raise UnsupportedQuantization(f"{name}: a positive number, or -1 for all, got {value!r}.")
        if self.rows == -1 and self.group_size != -1:
            raise UnsupportedQuantization("No format has one scale for all outputs and several groups of inputs.")

    def groups(self, inputs: int) -> int:
        """Groups of so many inputs; the last may be smaller."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the format stores scales in, for a model of `dtype`. Round to it before codes are chosen."""
        if self.format.startswith(("gptq", "awq")):
            return torch.float16
        return torch.float32 if self.format == "fp8" else dtype


class Format(NamedTuple):
    """What a file format does with one weight.

    Attributes:
        layout: What is stored, for a scheme, outputs, inputs and the dtype of the scales.
        pack: Grid, scheme and scales (rounded, as `layout` has them) to tensors.
        unpack: Tensors as `layout` has them, scheme, outputs and inputs to a grid.
        obstacle: Why the format cannot hold a weight of so many outputs and inputs, or `None`.
    """

    layout: Callable[[Scheme, int, int, torch.dtype], Layout]
    pack: Callable[[Grid, Scheme, torch.dtype], dict[str, Tensor]]
    unpack: Callable[[dict[str, Tensor], Scheme, int, int], Grid]
    obstacle: Callable[[Scheme, int, int], str | None]


def divides(scheme: Scheme, inputs: int) -> str | None:
    """Why the inputs do not fall into groups, or `None`."""
    if scheme.group_size != -1 and inputs % scheme.group_size:
        return f"its {inputs} inputs are no multiple of the group size {scheme.group_size}"
    return None


def whole_words(scheme: Scheme, inputs: int, outputs: int) -> str | None:
    """Why the codes along inputs or along outputs do not fill whole words, or `None`."""
    for name, count in (("inputs", inputs), ("outputs", outputs)):
        if count * scheme.bits % 32:
            return f"its {count} {name} of {scheme.bits} bits do not fill whole words of 32 bits"
    return None


def zeros_of(grid: Grid) -> Tensor:
    """The zeros of a grid, uint8 `[outputs, groups]`, also where it is symmetric."""
    if grid.zeros is not None:
        return grid.zeros
    return torch.full_like(grid.scales, 2 ** (grid.bits - 1), dtype=torch.uint8)


def or_symmetric(zeros: Tensor, scheme: Scheme) -> Tensor | None:
    """`None` where a symmetric scheme has all zeros in the middle, as it should."""
    return None if scheme.symmetric and bool((zeros == 2 ** (scheme.bits - 1)).all()) else zeros


def index_of(stored: Tensor | None, scheme: Scheme, inputs: int) -> Tensor | None:
    """A stored group index, or `None` where groups follow one another."""
    if stored is None:
        return None
    groups = scheme.groups(inputs)
    if torch.equal(stored, in_order(scheme, inputs, stored.device)) or bool((stored == -1).all()):
        return None  # -1: compressed-tensors made the index and never filled it
    if bool((stored < 0).any()) or bool((stored >= groups).any()):
        raise InvalidCheckpoint(f"the group index names groups beyond the {groups} that there are")
    return stored


def in_order(scheme: Scheme, inputs: int, device: torch.device) -> Tensor:
    """The group of each input where groups follow one another, int32 `[inputs]`."""
    size = inputs if scheme.group_size == -1 else scheme.group_size
    return torch.arange(inputs, dtype=torch.int32, device=device) // size


def scale_shape(scheme: Scheme, outputs: int, inputs: int) -> tuple[int, ...]:
    """Shape of the scales where several outputs may share one."""
    if scheme.rows == -1:
        return () if scheme.format == "fp8" else (1,)
    return -(-outputs // scheme.rows), scheme.groups(inputs)


def repeated(shared: Tensor, scheme: Scheme, outputs: int) -> Tensor:
    """Scales or zeros as `scale_shape` has them to `[outputs, groups]`."""
    if scheme.rows == -1:
        return shared.reshape(1, 1).repeat(outputs, 1)
    return shared if scheme.rows == 1 else shared.repeat_interleave(scheme.rows, 0)[:outputs]


def shared(each: Tensor, scheme: Scheme) -> Tensor:
    """Scales or zeros `[outputs, groups]` as `scale_shape` has them; undoes `repeated`."""
    if scheme.rows == 1:
        return each.contiguous()
    kept = each[:: len(each) if scheme.rows == -1 else scheme.rows].contiguous()
    if not torch.equal(repeated(kept, scheme, len(each)), each):
        raise UnsupportedQuantization("Outputs that share a scale in the file have different ones.")
    return kept.reshape(scale_shape(scheme, 1, 1)) if scheme.rows == -1 else kept
