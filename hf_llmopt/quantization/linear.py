"""A linear module whose weight is quantized.

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

from ..errors import InvalidCheckpoint, UnsupportedQuantization
from ..kernels import reference
from ..kernels.arguments import Grid
from ..kernels.weight import KernelWeight, pack
from . import formats, traced
from .formats import Scheme
from .product import BUFFER, CHANGING, Product, as_autocast, is_offloaded, is_readable, is_unobserved, needs_gradient


class DenseCopy(Tensor):
    """What a quantized weight stands for. It is made anew each time, so that a write to it would be lost."""

    # What is computed from it is a plain tensor, as with a parameter.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The same numbers. Whoever assigns others would merge an adapter into a weight that has no room for it."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UnsupportedQuantization(
            "A quantized weight cannot be written, so that no adapter can be merged into it. Leave the adapter beside "
            "it; or make the model dense, model.dequantize(), and then merge."
        )


class QuantizedLinear(Product):
    """`x @ w^T + bias`, w quantized. To others it is an `nn.Linear`, so that adapters (PEFT) stand beside it.

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
        super(nn.Linear, self).__init__()  # no weight is made
        self._is_hf_initialized = True  # transformers need not: what no file holds is an error, or made later
        self._number = traced.register(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.activations = True
        self.kernel: KernelWeight | None = None
        dtype = dtype or torch.get_default_dtype()
        self._dtype = self._scale_dtype = dtype
        stored = formats.tensors(scheme, out_features, in_features, dtype)
        self._store({name: torch.empty(shape, dtype=kind) for name, (shape, kind) in stored.items()})
        kept = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", kept)

    @classmethod
    def from_grid(cls, grid: Grid, scheme: Scheme, bias: Tensor | None = None) -> QuantizedLinear:
        """A module with this weight, stored as `scheme` says."""
        outputs, inputs = grid.codes.shape
        with torch.device("meta"):
            module = cls(inputs, outputs, scheme, bias is not None, grid.scales.dtype)
        if bias is not None:
            if bias.shape != (outputs,):
                raise UnsupportedQuantization(f"A bias of {outputs} outputs is [{outputs}], got {list(bias.shape)}.")
            module.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
            module.bias._is_hf_initialized = True  # type: ignore[attr-defined]  # it is no bias that a file lacks
        module._store(formats.pack(grid, scheme, grid.scales.dtype))
        return module

    def __getattr__(self, name: str) -> Any:
        """`weight`, where the format stores none: what the grid stands for, made anew each time.

        Some of transformers' models look at it, multiply with it themselves (Mamba), or initialize it.
        """
        if name != "weight" or "weight" in self._parameters:
            return super().__getattr__(name)
        if self.kernel is None and any(tensor.is_meta for tensor in self._stored().values()):
            weight = torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")
        else:
            weight = self.dense(self._dtype)
        weight = weight.as_subclass(DenseCopy)
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
        if self.kernel is None and not is_offloaded(self):
            with CHANGING:  # threads may meet a module that is not ready
                self._prepare()

    def _prepare(self) -> None:
        if self.kernel is not None:
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
        with CHANGING:
            if self.kernel is None:
                return
            stored, names = self._repacked(), list(self.kernel.tensors)
            self._store(stored)
            self.kernel = None
            for name in names:
                delattr(self, BUFFER + name)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        if is_unobserved(x):
            return self.multiply(x, self.bias, False)
        x, bias = as_autocast(x, self.bias)
        exactly = needs_gradient(x, bias)
        # A kernel's layout is here for the backward pass too; what accelerate brings for a forward is not.
        if torch.compiler.is_compiling() or (exactly and self.kernel is not None):
            return traced.quantized_linear(x, bias, self._number, self.out_features, exactly)
        return self.multiply(x, bias, exactly)

    def multiply(self, x: Tensor, bias: Tensor | None, exactly: bool) -> Tensor:
        """The product, by a kernel if it can read x and does not have to be exact."""
        self.prepare()
        kernel = self.kernel
        # The weights of an offloaded module are here for this forward only. And torch knows what to say of inputs that
        # no kernel can read.
        if kernel is None or exactly or not is_readable(x, self.in_features, self._device()):
            return linear(x, self.dense(x.dtype if x.is_floating_point() else self._dtype), bias)
        return kernel.product(x, bias, activations=self.activations)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the grid stands for, `[outputs, inputs]`."""
        kernel = self.kernel
        return reference.dequantize(self.grid(), dtype) if kernel is None else kernel.dequantize(dtype)

    def _device(self) -> torch.device:
        kernel = self.kernel
        held = self._stored() if kernel is None else kernel.tensors
        return next(iter(held.values())).device

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.scheme.format!r}, bits={self.scheme.bits}, group_size={self.scheme.group_size}, "
            f"activations={self.activations}"
        )

    def _store(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            parameter: Any = nn.Parameter(tensor, requires_grad=False)
            if tensor.is_meta:  # transformers draws random numbers for what no file holds, and replaces that before
                parameter._is_hf_initialized = True
            self._parameters[name] = parameter  # register_parameter thinks that there is a weight, see __getattr__

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
            wide = tensor.dtype.is_floating_point and tensor.element_size() > 1  # scales, which may be widened
            if given is not None and (not given.is_floating_point() if wide else given.dtype is not tensor.dtype):
                raise InvalidCheckpoint(
                    f"{prefix}{name} holds {given.dtype}; the format {self.scheme.format!r} has {tensor.dtype} there."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the weight, and never cast it: scales in another format are another weight.

        A kernel's layout is made for a device: on another one it is made anew, at the next forward.
        """
        if self.kernel is not None:
            here = self._device()
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
