"""Recording what a function makes a device do, so that it can be done again without running the function."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], Tensor]


class Capture(Protocol):
    """A way to record what a function makes a device do."""

    def __call__(self, run: Run) -> Run:
        """What computes the same again, from and into the same memory, without running `run`."""
        ...


# Operators whose result, or its shape, the host has to know.
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
}


class WaitsForDevice(RuntimeError):
    """A pass needs to know on the host what the device has computed."""


class NoWaiting(TorchDispatchMode):
    """Raises `WaitsForDevice` where an operator would wait for the device.

    While a graph is captured CUDA refuses that too, but a capture that fails leaves more behind than this does.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        waits = name in WAITING or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # by flags: their number is the shape
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            waits = isinstance(result, Tensor) and result.is_cuda != args[name == "copy_"].is_cuda
        if waits:
            raise WaitsForDevice(f"aten::{name} waits for the device")
        return result


_capturing = threading.Lock()  # torch allows one capture at a time in a process
_failed: list[torch.cuda.CUDAGraph] = []


class CudaCapture:
    """Recording by torch's CUDA graphs.

    All graphs share a pool of memory: they never run at the same time, and each keeps its output. That is overwritten
    by the next replay of the same graph alone.

    Args:
        device: That computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # When all graphs of a pool are gone and a tensor of theirs is not, torch takes no other graph into it.
        self._first = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _capturing, torch.cuda.stream(self._stream):
            self._recorded(self._first, lambda: torch.zeros(1, device=device), self._pool)

    def __call__(self, run: Run) -> Run:
        """As `Capture`."""
        with torch.cuda.device(self._device):
            now: Any = torch.cuda.current_stream()
            self._stream.wait_stream(now)
            with torch.cuda.stream(self._stream), NoWaiting():
                run()  # kernels that are not compiled yet, and cuBLAS's workspace, cannot be made while recording
            now.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with _capturing, torch.cuda.stream(self._stream):
                try:
                    found = self._recorded(graph, run, self._pool)
                except Exception:
                    with suppress(RuntimeError):
                        self._recover(graph)
                    raise

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay

    def _recorded(self, graph: torch.cuda.CUDAGraph, run: Run, pool: Any = None) -> Tensor:
        """What `run` returned while it was recorded."""
        torch.cuda.synchronize()
        # Other threads may allocate meanwhile.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            found = run()
        except Exception:
            with suppress(RuntimeError):  # which tells less than what led to it
                graph.capture_end()
            raise
        graph.capture_end()
        return found

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Put right what a capture that failed leaves behind, as far as it is known.

        The allocator goes on asking the graph whether what it allocates belongs to it; and in some versions the
        device's generator refuses to draw until a capture has succeeded.
        """
        _failed.append(graph)  # it must be there to be asked
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        self._recorded(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device=self._device))


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaCapture}  # by type of device
