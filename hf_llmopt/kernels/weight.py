"""A quantized weight in the layout of a kernel: the contract, and which kernel takes a weight."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from .arguments import Grid
from .torch_ops import kernels as torch_kernels


class KernelWeight(Protocol):
    """A quantized weight as one kernel reads it. It keeps no reference to the grid that it was packed from.

    Attributes:
        tensors: All that it holds, by name.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def pack(cls, grid: Grid) -> KernelWeight | None:
        """The weight in this layout, on the grid's device; `None` if the layout cannot hold it."""

    def unpack(self) -> Grid:
        """The same grid, bit for bit; scales may have been widened."""

    def product(self, x: Tensor, bias: Tensor | None = None, *, activations: bool = True) -> Tensor:
        """`x @ w^T + bias`, see `reference.quantized_linear`.

        Args:
            x: `[..., inputs]`.
            bias: `[outputs]`, or `None`.
            activations: Whether x may be rounded to int8.
        """

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that the grid stands for, `[outputs, inputs]`, see `reference.dequantize`."""


def pack(grid: Grid) -> KernelWeight:
    """The weight in the layout of the best kernel for it on its device.

    Example:
        >>> import torch
        >>> from hf_llmopt.kernels.arguments import Grid
        >>> weight = pack(Grid(torch.tensor([[8, 9]], dtype=torch.uint8), torch.ones(1, 1)))
        >>> weight.product(torch.tensor([[3.0, 4.0]]), activations=False)
        tensor([[4.]])
    """
    kinds: list[Any] = [*_own(grid.codes.device.type), *torch_kernels(grid.codes.device.type)]
    return next(packed for kind in kinds if (packed := kind.pack(grid)) is not None)


def _own(device: str) -> list[Any]:
    """Our kernels for a kind of device, where they can run."""
    if device == "cpu":
        from . import cpu

        return [cpu.BlockedWeight] if cpu.available() else []
    if device == "cuda" and triton_serves():
        from .triton.weight import TritonWeight

        return [TritonWeight]
    return []


def triton_serves() -> bool:
    """Whether the Triton kernels can run: on NVIDIA GPUs since Ampere."""
    found = find_spec("triton") is not None and torch.version.cuda is not None and torch.cuda.is_available()
    return found and torch.cuda.get_device_capability() >= (8, 0)
