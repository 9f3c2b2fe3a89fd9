"""Memory of host and device, tensors on their way between them, neither waiting for the other, and a device's time.

A copy from or to memory that the system may swap out waits until the device has done everything it was told before; one
from or to pinned memory is only put in line.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that can still be taken on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def pinned_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in pinned host memory, as many bytes as they are: `pin_memory=True` takes the next power of two.

    Args:
        shape: Of at least one element.
        dtype: Any.
        device: Copies to and from there, and is waited for before the memory is given back.

    Raises:
        MemoryError: The system gives no memory, or does not let it be pinned.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # large pages are pinned several times as fast
    tensor = torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)
    driver: Any = torch.cuda.cudart()
    if error := int(driver.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
        raise MemoryError(f"{tensor.nbytes / 2**30:.2f} GiB of memory could not be pinned (CUDA error {error})")
    unpin = weakref.finalize(memory, _unpin, driver, tensor.data_ptr(), device)
    unpin.atexit = False  # the process's end frees everything
    return tensor


def _unpin(driver: Any, address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # until nothing is copied there any more
    driver.cudaHostUnregister(address)


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
