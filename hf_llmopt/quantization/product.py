"""What a linear module with a quantized weight and a head with a quantized copy have in common."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from . import traced

CHANGING = threading.RLock()  # held while a module takes a kernel's tensors, or gives them back
BUFFER = "kernel_"  # what the names of a kernel's tensors begin with


class Product(nn.Linear):
    """A module that operators of torch find by a number."""

    _number: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = traced.register(self)  # type: ignore[arg-type]  # a copy is another module


def is_readable(x: Tensor, inputs: int, device: torch.device) -> bool:
    """Whether a kernel may multiply with x, and gives what torch would."""
    return x.shape[-1:] == (inputs,) and x.device == device and x.is_floating_point() and not x.is_neg()


def is_unobserved(x: Tensor) -> bool:
    """Whether nobody looks on: the case of every step, and each product is called often."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow, to one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def as_autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a product reads, in the type that autocast gives it: autocast knows torch's products only."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype is torch.float64:
        return x, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), None if bias is None else bias.to(dtype)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights for each forward."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))
