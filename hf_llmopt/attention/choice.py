"""Which backend reads the pages."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..config import OWN, guarded
from ..errors import CallbackFailed, InvalidOption
from ..kernels import cpu
from . import gpu
from .inputs import Attend, Call, StepInputs
from .paths import cpu_paged, reference_paged, sdpa

BACKENDS: dict[str, Attend] = {
    "cpu": cpu_paged,
    "triton": gpu.triton_paged,
    "sdpa": sdpa,
    "reference": reference_paged,
}


def backend(name: str, device: torch.device, batch_invariant: bool = False) -> Attend:
    """The backend for a configured name; `"auto"` takes the C kernels, or the fastest on a GPU, where they can run.

    Args:
        name: As in `AttentionConfig`.
        device: Where the keys lie.
        batch_invariant: Whether a query's result must not depend on its neighbours.

    Raises:
        InvalidOption: The backend cannot run here; the message says why.
    """
    if name == "auto":
        if device.type == "cuda" and gpu.why_not(device) is None and not batch_invariant:
            return gpu.fastest_paged
        name = "cpu" if device.type == "cpu" and cpu.available() else "sdpa"
    elif name == "cpu" and (device.type != "cpu" or not cpu.available()):
        reason = cpu.why_not() or f"the model's keys lie on {device}"
        raise InvalidOption(f"AttentionConfig(backend='cpu') cannot run: {reason}. Use 'auto' or 'sdpa'.")
    elif name == "triton" and (why_not := gpu.why_not(device)) is not None:
        raise InvalidOption(f"AttentionConfig(backend='triton') cannot run: {why_not}. Use 'auto' or 'sdpa'.")
    if batch_invariant and name != "cpu":
        given = f"the model is on {device}" if device.type != "cpu" else cpu.why_not() or f"backend={name!r}"
        raise InvalidOption(f"batch_invariant=True needs the C kernels and a model on the CPU: {given}.")
    return BACKENDS[name] if name in BACKENDS else partial(_own, name, OWN["attention"][name])


def _own(name: str, attend: Attend, step: StepInputs, call: Call) -> Tensor:
    """A user's function, whose mistakes are told by its name.

    Raises:
        CallbackFailed: It raised, or what it gave is not attention's.
    """
    found = guarded("attention", name, "it", attend, step, call)
    wanted = [1, call.query.shape[2], call.query.shape[1], call.value.shape[3]], call.query.dtype
    got = (list(found.shape), found.dtype) if isinstance(found, Tensor) else type(found).__name__
    if got != wanted:
        raise CallbackFailed(f"attention {name!r}: it returned {got}; [1, tokens, heads, value_dim] is {wanted} here.")
    return found
