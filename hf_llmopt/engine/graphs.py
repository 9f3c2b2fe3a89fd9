"""CUDA graphs: passes over short spans are recorded once and replayed.

A pass that decodes a few tokens is some thousand launches, which take the host longer than the device. A graph is
launched at once. Replaying runs no Python, so whatever differs between passes must lie in tensors at fixed addresses:
ids, positions, slots, block tables and lengths, which one copy brings to the device. Counts are rounded up, and what
is added is padding that reads and writes page 0 alone.

A kind of pass (`Key`) runs eagerly when it is first met, is recorded when it is met again, and then, on inputs other
than those it was recorded with, compared with the eager pass; from then on it is replayed. What cannot be recorded runs
eagerly, and `Graphs.why_not` says why.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..attention import FixedInputs, Span, StepInputs, backend, configs_of, cut, listed, replayable
from ..config import LLMOptConfig
from ..errors import InvalidOption
from ..kv_cache import PagedStore
from ..prompt_cache.epoch import adapted, running, runs_more, settings
from ..walk import modules

LONGEST = 16  # tokens of a span; longer ones keep the device busy by themselves, and no kernel of ours decodes them
MOST_TOKENS = 512  # of a pass, likewise
SHORTEST = 256  # tokens that contexts are rounded up to, at least; beyond, to a power of two
MOST = 128  # graphs; when there are more, all are given up

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


class Key(NamedTuple):
    """What passes have in common that one graph serves; every Python number of a pass follows from it.

    Attributes:
        rows: Spans, rounded up.
        length: Tokens of each.
        context: Tokens of the longest request, rounded up: the width of the block tables, and the parts that attention
            splits keys into.
        kept: Tokens of a span whose logits are computed: the last one, or all.
    """

    rows: int
    length: int
    context: int
    kept: int


@dataclass
class Batch:
    """A pass, as the host knows it.

    Attributes:
        spans: Shortest first.
        ids: Of each token.
        positions: Likewise.
        kept: Places of tokens whose logits somebody wants.
        slots: Per cache group, where each token is written, int64 `[tokens]` on the CPU.
        columns: As in `SpanCache`, on the CPU; `None` where the model does not ask for them.
    """

    spans: Sequence[Span]
    ids: Sequence[int]
    positions: Sequence[int]
    kept: Sequence[int]
    slots: Sequence[Tensor]
    columns: Tensor | None


class Parts(NamedTuple):
    """What a pass reads, as views of one buffer of int64.

    Attributes:
        ids: `[tokens]`.
        positions: `[tokens]`.
        columns: `[tokens]`.
        kept: `[rows * kept]`.
        slots: Per cache group, `[tokens]`.
        tiles: Per cache group, int32 `[rows, 3]`.
        tables: Per cache group, int32 `[rows, pages]`.
        items: Per cache group, int32 `[tokens, 3]`.
    """

    ids: Tensor
    positions: Tensor
    columns: Tensor
    kept: Tensor
    slots: list[Tensor]
    tiles: list[Tensor]
    tables: list[Tensor]
    items: list[Tensor]


class Inputs:
    """The tensors that a graph reads.

    Args:
        key: Their sizes.
        store: The pages.
        device: Where they lie.
    """

    def __init__(self, key: Key, store: PagedStore, device: torch.device) -> None:
        self.key, self._store = key, store
        with torch.inference_mode(False):  # they outlive the call that made them
            self._buffer = torch.zeros(self._carve(None)[1], dtype=torch.long, device=device)
        self.on_device, _ = self._carve(self._buffer)

    def _carve(self, buffer: Tensor | None) -> tuple[Parts, int]:
        """The parts of a buffer (of none, if only its length is asked for), and its length."""
        rows, length, context, kept = self.key
        tokens, pages, groups = rows * length, -(-context // self._store.page_size), len(self._store.groups)
        used = 0

        def part(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            nonlocal used
            start, count = used, torch.Size(shape).numel()
            words = -(-count * dtype.itemsize // 8)
            used += -(-words // 16) * 16  # aligned as what the allocator returns, which kernels are compiled for
            given = torch.empty(words, dtype=torch.long) if buffer is None else buffer[start : start + words]
            return given.view(dtype)[:count].view(shape)

        single = part(tokens), part(tokens), part(tokens), part(rows * kept)
        slots = [part(tokens) for _ in range(groups)]
        tiles = [part(rows, 3, dtype=torch.int32) for _ in range(groups)]
        tables = [part(rows, pages, dtype=torch.int32) for _ in range(groups)]
        items = [part(tokens, 3, dtype=torch.int32) for _ in range(groups)]
        return Parts(*single, slots, tiles, tables, items), used

    def fill(self, batch: Batch) -> None:
        """Bring a pass to the device, in one copy.

        Padding rows are a request of one token, id 0 at position 0, whose key lies in the first slot of page 0.
        """
        pinned = self._buffer.is_cuda
        buffer = torch.zeros(self._buffer.shape, dtype=torch.long, device="cpu", pin_memory=pinned)
        parts, _ = self._carve(buffer)
        rows, tokens, length = len(batch.spans), len(batch.ids), self.key.length
        parts.ids[:tokens] = _host(batch.ids)
        parts.positions[:tokens] = _host(batch.positions)
        parts.kept[: len(batch.kept)] = _host(batch.kept)
        if batch.columns is not None:
            parts.columns[:tokens] = batch.columns
        for index, group in enumerate(self._store.groups):
            parts.slots[index][:tokens] = batch.slots[index]
            parts.tiles[index][:rows] = cut(batch.spans, length, index)
            for row in range(rows, self.key.rows):
                parts.tiles[index][row] = _host((row * length, length, 1))
            table, items = map(torch.from_numpy, listed(batch.spans, group, index))
            width = min(table.shape[1], parts.tables[index].shape[1])  # pages may be held for tokens to come
            parts.tables[index][:rows, :width] = table[:, :width]
            parts.items[index][:tokens] = items
            parts.items[index][tokens:, 0] = torch.arange(rows, self.key.rows).repeat_interleave(length)
            parts.items[index][tokens:, 2] = 1
        self._buffer.copy_(buffer, non_blocking=True)


def _host(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device="cpu")


class Compute(Protocol):
    """The model's pass."""

    def __call__(self, ids: Tensor, positions: Tensor, kept: Tensor, columns: Tensor, step: StepInputs) -> Tensor:
        """Logits `[kept, vocabulary]`."""
        ...


@dataclass
class _Recorded:
    """A graph, the tensors it reads, the attention paths in it, and whether it was compared with the eager pass."""

    inputs: Inputs
    replay: Run
    paths: set[str] = field(default_factory=set)
    proven: bool = False


class Graphs:
    """The graphs of a model over a store's pages.

    Args:
        model: Its passes; held weakly.
        store: The pages.
        config: What the caller asked for.

    Attributes:
        why_not: Why no pass is replayed, or `None`.
        replays: Passes that were replayed.

    Raises:
        InvalidOption: Graphs cannot be recorded here.
    """

    def __init__(self, model: PreTrainedModel, store: PagedStore, config: LLMOptConfig) -> None:
        device = store.layers[0].device
        if device.type not in CAPTURES:
            raise InvalidOption(
                f"graphs=True records CUDA graphs, and the model is on {device}. Move it to a GPU, or leave graphs out."
            )
        if config.attention.backend not in ("auto", "triton"):
            raise InvalidOption(
                f"graphs=True reads pages by the Triton kernels, got AttentionConfig({config.attention.backend!r}). "
                "Use 'auto' or 'triton', or leave graphs out."
            )
        backend("triton", device)  # or says why it cannot run
        self.store, self._device = store, device
        self._capture = CAPTURES[device.type](device)
        self._graphs: dict[Key, _Recorded | None] = {}  # `None`: met once
        self._state: object = None
        self._owners: list[weakref.ref[nn.Module]] = []
        self._addresses: list[int] = []
        self.why_not: str | None = None
        self.replays = 0
        self.refresh(model)

    def refresh(self, model: PreTrainedModel) -> None:
        """Look at the model again: graphs of what it no longer is are given up."""
        experts = [getattr(config, "_experts_implementation_internal", None) for config in configs_of(model)]
        state = running(model), experts, settings(model, adapted(model))
        if state == self._state and self._addresses == self._find_addresses():
            return
        self._state = state
        every = modules(model)
        self._owners = [weakref.ref(module) for module in every if module._parameters or module._buffers]
        self._addresses = self._find_addresses()
        self._graphs.clear()
        self.why_not = self._reason_against(model, every)

    def _reason_against(self, model: PreTrainedModel, every: Sequence[nn.Module]) -> str | None:
        """What of a model no graph would do."""
        devices = {layer.device for layer in self.store.layers}
        devices |= {tensor.device for module in every for tensor in _tensors(module)}
        if len(devices) > 1:
            return f"the model lies on {', '.join(sorted(map(str, devices)))}"
        if any(layer.offloaded for layer in self.store.layers):
            return "pages lie in host memory"
        if model.training:
            return "the model is in training mode"
        hooked = next((module for module in every if runs_more(module)), None)
        return None if hooked is None else f"a {type(hooked).__name__} has a hook or a forward of its own"

    def _find_addresses(self) -> list[int]:
        """Where pages and weights lie, and how often those were written: a quantized copy is made in Python."""
        found = [tensor.data_ptr() for tensor in (*self.store.keys, *self.store.values)]
        for reference in self._owners:
            module = reference()
            for tensor in () if module is None else _tensors(module):
                plain = type(tensor) in (Tensor, nn.Parameter)  # others may have no address
                found.append(tensor.data_ptr() if plain else id(tensor))
                found.append(0 if tensor.is_inference() else tensor._version)
        return found

    def run(
        self, batch: Batch, compute: Compute, put_unknown: Callable[[Tensor], None], note: Callable[[str], None]
    ) -> Tensor | None:
        """Compute a pass, if there is a graph for it.

        Args:
            batch: The pass.
            compute: The model's pass, eagerly.
            put_unknown: Writes ids that only the device knows into those on the device.
            note: Called with the names of the attention paths in the pass.

        Returns:
            The logits `[kept, vocabulary]`, nobody else's; `None` if the pass has to run eagerly.
        """
        key = _key(batch)
        if key is None or self.why_not is not None:
            return None
        if (addresses := self._find_addresses()) != self._addresses:  # pages were added, weights moved or exchanged
            self._addresses = addresses
            self._graphs.clear()
        if key not in self._graphs:
            if len(self._graphs) >= MOST:
                self._graphs.clear()
            self._graphs[key] = None
            return None
        try:
            found = self._run(key, batch, compute, put_unknown)
        except Exception as error:  # of the model, maybe: then the eager pass raises it too
            self._give_up(f"recording a pass raised {type(error).__name__}: {error}")
            return None
        recorded = self._graphs.get(key)
        if found is None or recorded is None:
            return None
        for path in recorded.paths:
            note(path)
        self.replays += 1
        return found[: max(1, len(batch.kept))].clone()  # the next replay overwrites it

    def _run(self, key: Key, batch: Batch, compute: Compute, put_unknown: Callable[[Tensor], None]) -> Tensor | None:
        recorded = self._graphs[key]
        inputs = Inputs(key, self.store, self._device) if recorded is None else recorded.inputs
        inputs.fill(batch)
        put_unknown(inputs.on_device.ids[: len(batch.ids)])
        if recorded is not None and recorded.proven:
            return recorded.replay()
        paths: set[str] = set()

        def run() -> Tensor:
            given = inputs.on_device
            lists = list(zip(given.tables, given.items, strict=True))
            numbers = key.rows, key.length, key.context
            step = FixedInputs(self.store, *numbers, given.slots, lists, given.tiles, replayable, paths.add)
            return compute(given.ids, given.positions, given.kept, given.columns, step)

        if recorded is None:
            self._graphs[key] = _Recorded(inputs, self._capture(run), paths)
            return None
        return self._prove(recorded, run, len(batch.kept))

    def _prove(self, recorded: _Recorded, run: Run, kept: int) -> Tensor | None:
        """The replay, if it gives what the eager pass gives from the same tensors; the keys it should write are gone.

        Both launch the same kernels on the same shapes, so they differ only where a kernel adds in no fixed order
        (atomics in mixtures of experts): then no farther than a few times two eager passes are apart.
        """
        expected = run()[:kept].clone()
        for layer, group in enumerate(self.store.group_of):
            for slots in (self.store.keys[layer], self.store.values[layer]):
                slots.index_fill_(0, recorded.inputs.on_device.slots[group], 0)
        found = recorded.replay()
        if not torch.equal(found[:kept], expected):
            kept_found = found[:kept].clone()
            noise, distance = _distance(run()[:kept], expected), _distance(kept_found, expected)
            if not distance <= 4 * noise:
                self._give_up(f"a replay gave other logits than the eager pass: {distance:.1e} of their size")
                return None
            found = recorded.replay()
        recorded.proven = True
        return found

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        self._graphs.clear()


def _key(batch: Batch) -> Key | None:
    """Of a pass that a graph may serve."""
    lengths = {span.length for span in batch.spans}
    length, rows = max(lengths), len(batch.spans)
    if len(lengths) > 1 or length > LONGEST or rows * length > MOST_TOKENS:
        return None
    if any(span.context <= length for span in batch.spans):  # a prompt's beginning: nothing that comes again and again
        return None
    rounded = -(-rows // 16) * 16 if rows > 16 else 1 << (rows - 1).bit_length()
    context = max(SHORTEST, 1 << (max(span.context for span in batch.spans) - 1).bit_length())
    return Key(rounded, length, context, 1 if len(batch.kept) <= rows else length)


def _tensors(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-6))
