"""Products with quantized weights as operators of torch, which compilers put into their graphs as one node.

A kernel's layout is no tensor, so an operator is given the number of the module that has it and finds the module when
it runs. A program that outlives its process must not hold such numbers: export a model that `dequantize()` made dense.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, library

from ..errors import UnsupportedQuantization


class Product(Protocol):
    """What an operator asks of a module."""

    def multiply(self, x: Tensor, bias: Tensor | None, exactly: bool) -> Tensor:
        """`x @ w^T + bias`; exactly: with the weight that backward passes multiply with."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, `[outputs, inputs]`."""


_numbers = count()
_modules: WeakValueDictionary[int, Product] = WeakValueDictionary()


def register(module: Product) -> int:
    """A number by which operators find a module, for as long as it lives."""
    number = next(_numbers)
    _modules[number] = module
    return number


def _module(number: int) -> Product:
    try:
        return _modules[number]
    except KeyError:
        raise UnsupportedQuantization(
            "A compiled program multiplies with a quantized module that is gone, or that lived in another process. "
            "Compile or export again, beside its model; to export for other processes, model.dequantize() first."
        ) from None


@library.custom_op("hf_llmopt::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, bias: Tensor | None, number: int, outputs: int, exactly: bool) -> Tensor:
    """`x @ w^T + bias` with the weight of a module.

    Args:
        x: `[..., inputs]`.
        bias: `[outputs]`, or `None`.
        number: Of the module.
        outputs: Of its weight.
        exactly: See `Product.multiply`. Needed where a gradient is.
    """
    return _module(number).multiply(x, bias, exactly)


@quantized_linear.register_fake
def _(x: Tensor, bias: Tensor | None, number: int, outputs: int, exactly: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@library.custom_op("hf_llmopt::dense_weight", mutates_args=())
def dense_weight(like: Tensor, number: int, outputs: int, inputs: int) -> Tensor:
    """The weight `[outputs, inputs]` of a module, in the number format of `like`."""
    return _module(number).dense(like.dtype)


@dense_weight.register_fake
def _(like: Tensor, number: int, outputs: int, inputs: int) -> Tensor:
    return like.new_empty(outputs, inputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.number, ctx.outputs, _ = inputs
    ctx.inputs = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    for_x = for_bias = None
    if ctx.needs_input_grad[0]:  # the dense weight is made again, instead of kept for every product of the model
        for_x = grad @ dense_weight(grad, ctx.number, ctx.outputs, ctx.inputs)
    if ctx.needs_input_grad[1]:
        for_bias = grad.reshape(-1, ctx.outputs).sum(0)
    return for_x, for_bias, None, None, None


quantized_linear.register_autograd(_backward, setup_context=_keep)
