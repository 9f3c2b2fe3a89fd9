"""Layers whose pages lie in host memory: a pass reads them through copies on the device, a layer ahead.

While a layer computes, the pages that the pass names are copied for the next one, on a stream of their own. So the
device holds two layers' worth of the requests in a pass, whatever all requests hold, and contexts may be larger than
its memory. New keys and values are written to the device's copy, and from there back to the host.

The copies of a pass stand in order of their page ids, so runs of pages stay runs, and each is one copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from .pool import BlockTable, PagePool
from .store import PagedStore


class Streams:
    """The stream of a device on which pages are copied, and the memory that they are copied to, two layers' worth.

    A CPU has no streams, and copies at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[tuple[int, int], Tensor] = {}

    def place(self, number: int, side: int, like: Tensor, slots: int) -> Tensor:
        """Memory on the device for the keys or values of a layer; layers two apart have the same.

        The host runs ahead of the device: memory from torch's allocator would be another for each layer until the
        device is done with the first, and all layers would lie on the device.

        Args:
            number: Of the layer.
            side: 0 for keys, 1 for values.
            like: The layer's slots on the host.
            slots: How many to give.

        Returns:
            `[slots, ...]`, alone in its storage's beginning.
        """
        nbytes, found = slots * like[0].nbytes, self._places.get((number % 2, side))
        if found is None or len(found) < nbytes:
            # A context that grows by a page at a time gets other memory seldom.
            found = torch.empty(nbytes + nbytes // 8, dtype=torch.uint8, device=self._device)
            self._places[number % 2, side] = found
        return found[:nbytes].view(like.dtype).view(slots, *like.shape[1:])

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy (from, to) behind all that the device was told before; returns what `wait` waits for."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        if self._copies is None:
            return None
        for pair in pairs:
            for tensor in pair:
                if tensor.is_cuda:
                    tensor.record_stream(self._copies)
        return self._copies.record_event()

    def wait(self, done: Any) -> None:
        """Let the device compute what follows after a copy."""
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)

    def settle(self) -> None:
        """Wait, on the host, until all copies are done."""
        if self._copies is not None:
            self._copies.synchronize()


class _Run(NamedTuple):
    """Neighbours that are neighbours on both sides: where they begin on the host and on the device, and how many."""

    host: int
    device: int
    length: int


def runs(host: Any, device: Any) -> list[_Run]:
    """Cut pairs of places, int64 `[n]` each, into runs.

    Example:
        >>> import numpy
        >>> [tuple(run) for run in runs(numpy.array([4, 5, 9]), numpy.array([1, 2, 3]))]
        [(4, 1, 2), (9, 3, 1)]
    """
    breaks = numpy.flatnonzero((numpy.diff(host) != 1) | (numpy.diff(device) != 1)) + 1
    starts = [0, *breaks.tolist()] if len(host) else []
    ends = [*starts[1:], len(host)]
    return [_Run(int(host[a]), int(device[a]), b - a) for a, b in zip(starts, ends, strict=True)]


class _Held(PagePool):
    """Page ids that are all held: nobody may read beyond a request's own."""

    def next_held(self, page: int) -> int:
        """The page itself, or the end of the pool."""
        return min(page, self.num_pages + 1)


class Staged(PagedStore):
    """A store as one pass sees it: pages in host memory are numbered anew, and are on the device when asked for.

    Args:
        store: The pages.
        tables: For each request of the pass its block tables, one per cache group.
        slots: Per cache group, the slot of each token of the pass, int64 `[tokens]` on the CPU.
        streams: Copies pages to and from the device.

    Attributes:
        tables_of_pass: Block tables by the new numbers.
        slots_of_pass: Slots likewise.
    """

    def __init__(
        self,
        store: PagedStore,
        tables: Sequence[Sequence[BlockTable]],
        slots: Sequence[Tensor],
        streams: dict[torch.device, Streams],
    ) -> None:
        vars(self).update(vars(store))
        self._store, self._streams = store, streams
        self.settle = lambda: None  # what is read here is in order on the streams
        self._current: int | None = None  # the layer that computes
        self._staged: dict[int, tuple[Tensor, Tensor, Any]] = {}  # it and the next: keys, values, when they are there
        self.groups, self.slots_of_pass = list(store.groups), list(slots)
        self.tables_of_pass = [list(row) for row in tables]
        self._pages: dict[int, list[_Run]] = {}  # per cache group in host memory: pages to fetch
        self._counts: dict[int, int] = {}
        self._written: dict[int, list[_Run]] = {}  # slots to write back
        for index, group in enumerate(store.groups):
            if not store.layers[group.layers[0]].offloaded:
                continue
            held = [numpy.frombuffer(row[index].pages, dtype=numpy.int32) for row in tables]
            named = numpy.unique(numpy.concatenate([numpy.zeros(1, numpy.int32), *held])).astype(numpy.int64)
            self._pages[index], self._counts[index] = runs(named, numpy.arange(len(named))), len(named)
            pool = _Held(len(named) - 1)
            for row, pages in zip(self.tables_of_pass, held, strict=True):
                places = array("i", numpy.searchsorted(named, pages).astype(numpy.int32).tobytes())
                row[index] = replace(row[index], pool=pool, pages=places, _plans=[])
            host = slots[index].numpy()
            device = numpy.searchsorted(named, host // self.page_size) * self.page_size + host % self.page_size
            self._written[index] = runs(host, device)
            self.slots_of_pass[index] = torch.from_numpy(device)
            self.groups[index] = replace(group, pool=pool)
        self._order = [layer for layer, spec in enumerate(store.layers) if spec.offloaded]
        self.keys = _Side(self._on_device, store.keys, 0)  # type: ignore[assignment]
        self.values = _Side(self._on_device, store.values, 1)  # type: ignore[assignment]

    def written(self, layer: int) -> None:
        """To the host, too."""
        if self.layers[layer].offloaded:
            pairs = self._pairs(layer, self._staged[layer][:2], self._written[self.group_of[layer]])
            self._streams[self.layers[layer].device].copy([(device, host) for host, device in pairs])

    def _on_device(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """A layer's slots on the device, and the next layer's on their way; `None` if they lie there anyway."""
        if not self.layers[layer].offloaded:
            return None
        if layer != self._current:
            found = self._staged.get(layer) or self._fetch(layer)
            self._streams[self.layers[layer].device].wait(found[2])
            self._current, self._staged = layer, {layer: found}
            following = self._order[self._order.index(layer) + 1 :][:1]
            self._staged |= {after: self._fetch(after) for after in following}
        return self._staged[layer][:2]

    def _fetch(self, layer: int) -> tuple[Tensor, Tensor, Any]:
        streams, size, group = self._streams[self.layers[layer].device], self.page_size, self.group_of[layer]
        number, count = self._order.index(layer), self._counts[group] * size
        keys, values = (
            streams.place(number, side, slots[layer], count)
            for side, slots in enumerate((self._store.keys, self._store.values))
        )
        pages = [_Run(host * size, device * size, length * size) for host, device, length in self._pages[group]]
        return keys, values, streams.copy(self._pairs(layer, (keys, values), pages))

    def _pairs(self, layer: int, staged: tuple[Tensor, Tensor], found: Sequence[_Run]) -> list[tuple[Tensor, Tensor]]:
        """Slots of runs on the host and on the device, keys and values."""
        return [
            (slots[run.host : run.host + run.length], copies[run.device : run.device + run.length])
            for slots, copies in zip((self._store.keys[layer], self._store.values[layer]), staged, strict=True)
            for run in found
        ]


class _Side(Sequence[Tensor]):
    """Keys or values of each layer, where a pass reads them."""

    def __init__(
        self, on_device: Callable[[int], tuple[Tensor, Tensor] | None], own: Sequence[Tensor], side: int
    ) -> None:
        self._on_device, self._own, self._side = on_device, own, side

    def __getitem__(self, layer: Any) -> Any:
        found = self._on_device(layer)
        return self._own[layer] if found is None else found[self._side]

    def __len__(self) -> int:
        return len(self._own)
