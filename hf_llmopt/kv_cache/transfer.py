"""Tensors on their way between host and device, neither waiting for the other, and how long a device takes.

A copy from or to memory that the system may swap out waits until the device has done everything it was told before; one
from or to pinned memory is only put in line.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """A small tensor on its way to the host.

    Args:
        tensor: On any device.

    Example:
        >>> import torch
        >>> Download(torch.tensor([3, 5])).read()
        [3, 5]
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def read(self) -> list[int]:
        """Its elements; waits for what computes them, and for nothing that the device was told later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[int] = self._host.tolist()
        return found


class Clock:
    """Times what a device is told between its making and `stop`.

    Args:
        device: Any.

    Example:
        >>> import torch
        >>> clock = Clock(torch.device("cpu"))
        >>> clock.stop()
        >>> clock.seconds() >= 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._ended: Any = None

    def stop(self) -> None:
        """What the device is told from now on does not count."""
        self._ended = self._now()

    def seconds(self) -> float | None:
        """The time it took, or `None` while it is not done."""
        if self._device.type != "cuda":
            return float(self._ended - self._began)
        return float(self._began.elapsed_time(self._ended)) / 1e3 if self._ended.query() else None

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return perf_counter()
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))
