"""Which way of computing a product is fastest on this device: measured once for a shape, kept for other processes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton

from ..race import best_seconds

REPEATS = 9
UNFIT = triton.runtime.errors.OutOfResources, torch.OutOfMemoryError  # a way that does not fit the device
COMPILERS = 8  # kernels that are compiled at a time

_compiling: ContextVar[bool] = ContextVar("_compiling", default=False)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Way(NamedTuple):
    """A way of computing a product: a function's name, and its configuration."""

    name: str
    configuration: tuple[int, ...] = ()

    def __str__(self) -> str:
        return _written(self)


@cache
def _written(way: Way) -> str:
    """Kept, because products of a pass ask for it again and again."""
    return " ".join(map(str, (way.name, *way.configuration)))


class Table:
    """The fastest ways of a device, in a file beside Triton's compiled kernels.

    A file that cannot be read or written costs a measurement, nothing else.

    Args:
        path: JSON, names of ways by key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ways = self._read()

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self, key: str, way: Way) -> None:
        """Add an entry, and what other processes added meanwhile."""
        self.ways = {**self._read(), **self.ways, key: str(way)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(self.ways, file, indent=0, sort_keys=True)
            os.replace(file.name, self.path)  # readers see the old file or the new one
        except OSError:
            pass


@cache
def table(device: torch.device) -> Table:
    """The table of a device's model; drivers and versions of torch and Triton change what is fastest."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "hf_llmopt"
    name = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__}"
    return Table(folder / f"{''.join(c if c.isalnum() or c in '.-+' else '-' for c in name)}.json")


def fastest(key: str, ways: Sequence[Way], call: Callable[[Way], Any], device: torch.device) -> Way | None:
    """The way that took least time; the first that works where times are equal.

    Args:
        key: Of the shape.
        ways: To choose from.
        call: Computes the product.
        device: That computes.

    Returns:
        `None` where nothing may be measured: while a CUDA graph is captured, and while the ways of a product that
        contains this one are compiled.
    """
    kept, known = table(device), {str(way): way for way in ways}
    if kept.ways.get(key) in known:
        return known[kept.ways[key]]
    if torch.cuda.is_current_stream_capturing():
        return None
    if not _compile([partial(call, way) for way in ways], device):
        return None
    times = {way: milliseconds(call, way) for way in ways}
    way = min(ways, key=times.__getitem__)
    if times[way] < float("inf"):
        kept.keep(key, way)
    return way


def raced(key: str, ways: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    """The name of the way that took least time, launching included; remembered as `fastest` does.

    Args:
        key: Of the shape.
        ways: By name; the first is taken where nothing may be measured, while a CUDA graph is captured.
        device: That computes.
    """
    kept = table(device)
    if kept.ways.get(key) in ways:
        return kept.ways[key]
    if torch.cuda.is_current_stream_capturing():
        return next(iter(ways))

    def timed(way: Callable[[], Any]) -> None:
        way()
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    for way in ways.values():
        timed(way)  # compiles
    times = dict(zip(ways, best_seconds([partial(timed, way) for way in ways.values()]), strict=True))
    name = min(times, key=times.__getitem__)
    kept.keep(key, Way(name))
    return name


def _compile(calls: Sequence[Callable[[], Any]], device: torch.device) -> bool:
    """Run calls for the kernels that they compile, several at a time: the compiler does not hold Python's lock.

    Args:
        calls: Each computes something; nothing of it is kept, nor what does not fit the device.
        device: That computes.

    Returns:
        Whether they may be timed now; not within such a call, beside others.
    """
    inference, outermost = torch.is_inference_mode_enabled(), not _compiling.get()

    def run(call: Callable[[], Any]) -> None:
        _compiling.set(True)
        with on(device), torch.inference_mode(inference), torch.no_grad(), suppress(*UNFIT):
            call()

    if outermost:
        # A thread has no CUDA context before it called the runtime, which Triton's launcher does not.
        with ThreadPoolExecutor(COMPILERS, initializer=partial(torch.cuda.synchronize, device)) as pool:
            list(pool.map(run, calls))
    else:
        for call in calls:
            run(call)
    return outermost


def milliseconds(call: Callable[[Way], Any], way: Way) -> float:
    """Median time of a product on the device with cold caches; infinite if it does not fit the device.

    It is replayed from a CUDA graph behind a write that fills the caches: launching takes the host longer than most
    products take, and would hide what a second kernel costs.
    """
    try:
        cold = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(_aside(torch.cuda.current_device())):
            call(way)
            torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            call(way)
            graph.capture_end()
        return median(_replayed(graph, cold) for _ in range(REPEATS))
    except UNFIT:
        return float("inf")


@cache
def _aside(device: int) -> torch.cuda.Stream:
    """One stream for all captures: torch keeps a workspace for each stream that cuBLAS has seen."""
    return torch.cuda.Stream(device)


def _replayed(graph: torch.cuda.CUDAGraph, cold: torch.Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cold.zero_()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
