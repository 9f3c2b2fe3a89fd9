"""Which backend reads the pages."""

from __future__ import annotations

import torch

from ..config import OWN
from ..errors import InvalidOption
from ..kernels import cpu
from . import gpu
from .inputs import Attend
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
    found: Attend = (BACKENDS | OWN["attention"])[name]
    return found
