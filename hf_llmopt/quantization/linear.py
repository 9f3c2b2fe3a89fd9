"""A linear module whose weight is quantized, and an output head with a quantized copy.

A module has two states. *Stored*: its parameters are the tensors of a file format, as they are loaded and saved.
*Ready*: a kernel's layout has taken their place. `state_dict` always shows the stored tensors, so that a model can be
saved after it has run, by whatever means. Modules whose weights accelerate brings from the CPU or from disk for each
forward stay stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import InvalidCheckpoint
from ..kernels import reference
from ..kernels.arguments import Grid
from ..kernels.weight import KernelWeight, pack
from . import formats
from .formats import Scheme
from .grid import make_grid

BUFFER = "kernel_"  # what the names of a kernel's tensors begin with


class QuantizedLinear(nn.Module):
    """`x @ w^T + bias`, w quantized.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        scheme: How the weight is stored.
        bias: Whether there is one.
        dtype: Of the bias, and of scales where the format leaves that open.

    Attributes:
        kernel: The weight as a kernel reads it, once the module is ready.
        activations: Whether what the module reads may be rounded to int8.

    Example:
        >>> import torch
        >>> from hf_llmopt.quantization import QuantizedLinear, Scheme, make_grid
        >>> grid = make_grid(torch.randn(32, 64), bits=4, group_size=32)
        >>> module = QuantizedLinear.from_grid(grid, Scheme("gptq", bits=4, group_size=32, symmetric=True))
        >>> module(torch.ones(1, 64)).shape, sorted(module.state_dict())
        (torch.Size([1, 32]), ['g_idx', 'qweight', 'qzeros', 'scales'])
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.activations = True
        self.kernel: KernelWeight | None = None
        dtype = dtype or torch.get_default_dtype()
        self._dtype = self._scale_dtype = dtype
        stored = formats.tensors(scheme, out_features, in_features, dtype)
        self._store({name: torch.empty(shape, dtype=kind) for name, (shape, kind) in stored.items()})
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_grid(cls, grid: Grid, scheme: Scheme, bias: Tensor | None = None) -> QuantizedLinear:
        """A module with this weight, stored as `scheme` says."""
        outputs, inputs = grid.codes.shape
        with torch.device("meta"):
            module = cls(inputs, outputs, scheme, bias is not None, grid.scales.dtype)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
            module.bias._is_hf_initialized = True  # type: ignore[attr-defined]  # it is no bias that a file lacks
        module._store(formats.pack(grid, scheme, grid.scales.dtype))
        return module

    def __getattr__(self, name: str) -> Any:
        """`weight`, where the format stores none: its shape and dtype, on the meta device.

        Some of transformers' models look at the dtype of a product's weight, or initialize it.
        """
        if name != "weight" or "weight" in self._parameters:
            return super().__getattr__(name)
        weight = torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def grid(self) -> Grid:
        """The weight in no particular layout; scales may be wider than stored."""
        if self.kernel is not None:
            return self.kernel.unpack()
        return formats.unpack(self._stored(), self.scheme, self.out_features, self.in_features)

    def prepare(self) -> None:
        """Put the weight into the layout of a kernel, which takes the place of the stored tensors.

        Raises:
            InvalidCheckpoint: The stored tensors are not a weight of this scheme.
        """
        if self.kernel is not None or _is_offloaded(self):
            return
        grid = self.grid()
        self._scale_dtype = grid.scales.dtype
        kernel = pack(grid)
        for name in list(self._stored()):
            del self._parameters[name]
        for name, tensor in kernel.tensors.items():
            self.register_buffer(BUFFER + name, tensor, persistent=False)
        self.kernel = kernel

    def restore(self) -> None:
        """Go back to the stored tensors."""
        if self.kernel is None:
            return
        stored = self._repacked()
        for name in self.kernel.tensors:
            delattr(self, BUFFER + name)
        self.kernel = None
        self._store(stored)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        self.prepare()
        if self.kernel is None or (torch.is_grad_enabled() and x.requires_grad):
            # The weights of an offloaded module are here for this forward only; and torch knows the gradient of a
            # dense product.
            dense = (
                reference.dequantize(self.grid(), x.dtype) if self.kernel is None else self.kernel.dequantize(x.dtype)
            )
            return linear(x, dense, self.bias)
        return self.kernel.product(x, self.bias, activations=self.activations)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.scheme.format!r}, bits={self.scheme.bits}, group_size={self.scheme.group_size}"
        )

    def _store(self, tensors: dict[str, Tensor]) -> None:
        # Not by register_parameter, which thinks that there is a weight, see __getattr__.
        self._parameters.update({n: nn.Parameter(tensor, requires_grad=False) for n, tensor in tensors.items()})

    def _stored(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._parameters.items() if name != "bias" and p is not None}

    def _repacked(self) -> dict[str, Tensor]:
        grid = self.grid()
        return formats.pack(grid._replace(scales=grid.scales.to(self._scale_dtype)), self.scheme, self._scale_dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination.update({prefix + name: tensor for name, tensor in self._repacked().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.restore()
        for name, tensor in self._stored().items():
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype.is_floating_point != tensor.dtype.is_floating_point:
                raise InvalidCheckpoint(
                    f"{prefix}{name} holds {given.dtype}; the format {self.scheme.format!r} has {tensor.dtype} there."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the weight, and never cast it: scales in another format are another weight.

        A kernel's layout is made for a device: on another one it is made anew, at the next forward.
        """
        if self.kernel is not None:
            here = next(iter(self.kernel.tensors.values())).device
            if fn(torch.empty(0, dtype=torch.uint8, device=here)).device != here:
                self.restore()
        bias, kept = self.bias, dict(self._buffers)
        self._buffers.clear()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype is tensor.dtype else tensor.to(moved.device)

        try:
            return super()._apply(move, recurse)
        finally:
            self._buffers.update(kept)


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights for each forward."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


class QuantizedHead(nn.Linear):
    """An output head that multiplies with a quantized copy of its weight.

    The weight stays: it may be the embedding's, and it is what files keep. When it changes, so does the copy.
    """

    bits: int
    group_size: int
    _mark: Any = None  # of the weight that the copy was made from
    _kernel: KernelWeight

    @classmethod
    def of(cls, head: nn.Linear, bits: int, group_size: int) -> QuantizedHead:
        """A head with the parameters of another one."""
        with torch.device("meta"):
            made = cls(head.in_features, head.out_features, head.bias is not None)
        made._parameters.update(head._parameters)
        made.bits, made.group_size = bits, group_size
        return made.train(head.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        if (torch.is_grad_enabled() and x.requires_grad) or _is_offloaded(self):
            return super().forward(x)
        mark = self.weight.data_ptr(), self.weight._version, self.weight.device
        if mark != self._mark:
            self._kernel = pack(make_grid(self.weight.detach(), self.bits, self.group_size))
            self._mark = mark
        return self._kernel.product(x, self.bias)
