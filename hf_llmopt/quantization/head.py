"""An output head with a quantized copy of its weight."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..kernels.weight import KernelWeight, pack
from . import traced
from .grid import make_grid
from .product import BUFFER, CHANGING, Product, as_autocast, is_offloaded, is_readable, is_unobserved, needs_gradient

SAMPLES = 16  # elements of the weight by which a change is seen


class QuantizedHead(Product):
    """An output head that multiplies with a quantized copy of its weight.

    The weight stays: it may be the embedding's, and it is what files keep. When it changes, so does the copy: where
    torch counts the change, and on a CPU where one of a few elements is another, which shows writes through `.data`.
    """

    bits: int
    group_size: int
    kernel: KernelWeight | None = None
    _mark: Any = None  # of the weight that the copy was made from
    _places: Tensor  # of the elements that are looked at
    _sample: Tensor  # what they were

    @classmethod
    def of(cls, head: nn.Linear, bits: int, group_size: int) -> QuantizedHead:
        """A head with the parameters of another one."""
        with torch.device("meta"):
            made = cls(head.in_features, head.out_features, head.bias is not None)
        made._parameters.update(head._parameters)
        made._number = traced.register(made)
        made.bits, made.group_size = bits, group_size
        made.prepare()
        return made.train(head.training)

    def prepare(self) -> None:
        """Make the copy, if there is none of the weight as it is."""
        weight = self.weight.detach()
        if is_offloaded(self) or weight.is_meta:
            return
        mark = weight.data_ptr(), weight._version, weight.device
        if mark == self._mark and (weight.device.type != "cpu" or torch.equal(weight.take(self._places), self._sample)):
            return
        with CHANGING:
            draw = Random()
            places = [draw.randrange(weight.numel()) for _ in range(SAMPLES)]
            self._places = torch.tensor(places, device=weight.device)
            self._sample = weight.take(self._places)
            kernel = pack(make_grid(weight, self.bits, self.group_size))
            for name, tensor in kernel.tensors.items():
                self.register_buffer(BUFFER + name, tensor, persistent=False)
            self.kernel, self._mark = kernel, mark

    def forget(self) -> None:
        """Drop the copy; the next forward makes another one."""
        with CHANGING:
            self._mark = self.kernel = None
            self._buffers.clear()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        if is_unobserved(x):
            return self.multiply(x, self.bias, False)
        x, bias = as_autocast(x, self.bias)
        exactly = needs_gradient(x, self.weight, bias)
        if torch.compiler.is_compiling() and not exactly:
            return traced.quantized_linear(x, bias, self._number, self.out_features, exactly)
        return self.multiply(x, bias, exactly)

    def multiply(self, x: Tensor, bias: Tensor | None, exactly: bool) -> Tensor:
        """The product, with the weight itself if it has to be exact."""
        if not exactly and is_readable(x, self.in_features, self.weight.device):
            self.prepare()
            kernel = self.kernel
            if kernel is not None:
                return kernel.product(x, bias)
        return linear(x, self.weight, bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight itself, `[outputs, inputs]`."""
        return self.weight.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedHead:
        """The copy is no weight to be moved or cast."""
        self.forget()
        return super()._apply(fn, recurse)
