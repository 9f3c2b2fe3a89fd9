"""Moves the pages of requests: tables to start with, keys that go to host memory and come back, copies."""

from __future__ import annotations

from time import perf_counter

import psutil
import torch

from ..config import BatchingConfig
from ..kv_cache import BlockTable, PagedStore, Swapped
from .evict import Evictor
from .request import Request, Rows
from .scheduler import Plan


class Costs:
    """What it has cost to compute keys and to copy them, to choose the cheaper when pages are taken away.

    Attributes:
        token_seconds: Seconds a token takes where many are computed together.
        byte_seconds: Seconds to copy a byte of keys and values to host memory or back; 0 until it was measured once.
    """

    def __init__(self) -> None:
        self.token_seconds = 0.0
        self.byte_seconds = 0.0

    def computed(self, tokens: int, seconds: float) -> None:
        """A pass over `tokens` tokens took `seconds`. The best passes count, and are slowly forgotten."""
        each = seconds / tokens
        self.token_seconds = min(each, 1.01 * self.token_seconds) if self.token_seconds else each

    def copied(self, nbytes: int, seconds: float) -> None:
        """Copying took `seconds`."""
        each = seconds / max(1, nbytes)
        self.byte_seconds = (self.byte_seconds + each) / 2 if self.byte_seconds else each

    def favour_copy(self, tokens: int, nbytes: int) -> bool:
        """Whether copying `nbytes` out and in is cheaper than computing `tokens` tokens again."""
        return 2 * nbytes * self.byte_seconds < tokens * self.token_seconds


class Mover:
    """What happens to the pages of requests between passes. Called with the engine's lock held.

    Args:
        store: The pages.
        config: How much host memory keys may take.
        evictor: Takes tokens away, or `None`.

    Attributes:
        costs: Of computing and of copying, so far.
        swapped_bytes: Of host memory that saved keys take.
    """

    def __init__(self, store: PagedStore, config: BatchingConfig, evictor: Evictor | None) -> None:
        self._store = store
        self._config = config
        self._evictor = evictor
        self.costs = Costs()
        self.swapped_bytes = 0

    def tables(self, request: Request) -> list[BlockTable]:
        """Tables of a request that starts, or goes on after its keys were saved."""
        tables = self._store.tables(request.rooms)
        if request.swapped is not None:
            for table, passed in zip(tables, request.swapped.passed, strict=True):
                table.skip(passed * self._store.page_size)
            for index in self._evictor.full if self._evictor is not None else ():
                tables[index].evicted, tables[index].settled = request.evicted, request.computed
        return tables

    def saves(self, request: Request) -> bool:
        """Whether to save the keys of a request that loses its pages, by what both ways have cost so far."""
        held = [table.held for table in request.tables]
        nbytes = sum(count * self._store.page_bytes(index) for index, count in enumerate(held))
        if self.swapped_bytes + nbytes > min(self._config.swap_bytes, psutil.virtual_memory().available):
            return False
        return self.costs.favour_copy(request.computed, nbytes)

    def drop_saved(self, request: Request) -> None:
        """Forget a request's keys in host memory, if it has any there."""
        if request.swapped is not None:
            self.swapped_bytes -= request.swapped.nbytes
            request.swapped = None

    def move(self, plan: Plan) -> None:
        """What must happen to pages before anything else is written to them."""
        device = self._store.layers[0].device
        if plan.saves and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # what is timed is the copy alone
        for request, pages in plan.saves:
            began = perf_counter()
            request.swapped = Swapped(self._store, pages)
            self.swapped_bytes += request.swapped.nbytes
            self.costs.copied(request.swapped.nbytes, perf_counter() - began)
        for index, (wipes, copies) in enumerate(zip(plan.wipes, plan.copies, strict=True)):
            if copies:
                self._store.copy_pages(index, copies)
            targets = {target for _, target in copies}
            if left := [page for page in wipes if page not in targets]:
                self._store.wipe(index, left)
            wipes.clear()
            copies.clear()
        for request in plan.restores:
            request.swapped.restore(self._store, [table.pages for table in request.tables])
            self.drop_saved(request)
        plan.saves.clear()
        plan.restores.clear()

    def held(self, group: Rows) -> list[int]:
        """Pages that a group holds, per cache group."""
        holding = [request.tables for request in group.requests if request.tables]
        return [sum(tables[index].held for tables in holding) for index in range(len(self._store.groups))]
