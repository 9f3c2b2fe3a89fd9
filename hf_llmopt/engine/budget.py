"""Which requests fit: the pages they may need, and those that can be had."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..config import LLMOptConfig
from ..errors import OutOfPages
from ..kv_cache import PagedStore
from .evict import Evictor
from .request import Request, Rows
from .scheduler import Scheduler

AHEAD = 1024  # new tokens that pages are set aside for when a request is admitted


class Budget:
    """What an engine's pages can hold. Called with the engine's lock held, but for `rooms`.

    Args:
        store: The pages.
        config: How many there may be.
        scheduler: Knows who runs.
        evictor: Gives pages back early, or `None`.
    """

    def __init__(self, store: PagedStore, config: LLMOptConfig, scheduler: Scheduler, evictor: Evictor | None) -> None:
        self._store = store
        self._config = config
        self._scheduler = scheduler
        self._evictor = evictor

    def rooms(self, prompt: int, total: int, keeps_passed: bool = False) -> list[int]:
        """Pages to set aside for a request, per cache group.

        All it can ever need under an explicit budget in tokens, so that it cannot fail half-way. Under a budget in
        memory only what it needs soon: a large `max_new_tokens` is seldom used up, and pools grow.

        Args:
            prompt: Tokens of the prompt.
            total: Tokens of prompt and continuation at most.
            keeps_passed: Whether pages behind windows are kept.
        """
        size = self._store.page_size
        if self._config.kv_cache.max_tokens is None:
            total = min(total, prompt + AHEAD)
        span = total if keeps_passed else min(total, self._config.batching.max_batch_tokens)
        rooms = [group.pages_for(total, size, span) for group in self._store.groups]
        if self._evictor is not None:
            held = self._evictor.room(prompt, total, min(total, self._config.batching.max_batch_tokens))
            replayed = min(prompt, self._evictor.method.replayed)
            for index in range(len(rooms)):
                rooms[index] = 1 + (
                    -(-held // size) if index in self._evictor.full else rooms[index] + replayed // size
                )
        return rooms

    def check_fits(self, group: Rows) -> None:
        """Refuse a group that the budget can never hold.

        Requests that may be preempted need not fit beside one another: each must fit alone.

        Raises:
            OutOfPages: It can never fit; the message says what does.
        """
        members = group.requests
        if all(n <= pool.free for n, pool in zip(self.outstanding(members), self._scheduler.pools, strict=True)):
            return
        for together in [members] if any(r.protected for r in members) else [[request] for request in members]:
            if any(n > limit for n, limit in zip(self.outstanding(together), self._store.limits(), strict=True)):
                raise self.does_not_fit(together)

    def provide(self, group: Rows, groups: Collection[Rows]) -> bool:
        """Set the pages aside that a group's rows may ever need.

        Args:
            group: Not yet among the others.
            groups: All that the engine serves.

        Returns:
            `False` if that is not possible yet.

        Raises:
            OutOfPages: It never will be; the message says what fits.
        """
        self.check_fits(group)
        members = group.requests
        if group.submitted and self._scheduler.places() <= 0:
            return False
        wanted = self.outstanding(members)
        others = self.outstanding([request for request in self._scheduler.running if request.protected])
        # Rows of one group get equal room, so that their runs of pages lie at equal distances.
        spacing = [max(request.rooms[index] for request in members) for index in range(len(wanted))]
        self._store.provide([len(members) * a + b for a, b in zip(spacing, others, strict=True)])
        # What is submitted fills its pages at once: those that others would have to give up come too late.
        capacity = self.capacity(yielding=not group.submitted)
        if any(a + b > c for a, b, c in zip(wanted, others, capacity, strict=True)):
            # Pages that are held by the caller's own caches, or by calls that this one is nested in, will not come
            nested = not group.submitted and all(other.thread == group.thread for other in groups)
            if nested or not groups:
                raise self.does_not_fit(members)
            return False
        for request in members:
            request.tables = request.tables or self._store.tables(spacing)
            for cached, table in zip(self._store.groups, request.tables if request.brought else [], strict=False):
                table.skip(cached.first_visible(request.brought - 1))
        return True

    def provided(self, group: Rows) -> bool:
        """Whether the pages for the keys that a group brings are its own, or free."""
        for index, pool in enumerate(self._scheduler.pools):
            if sum(r.tables[index].missing(0, r.brought) for r in group.requests if r.awaits_keys) > pool.free:
                return False
        return True

    def outstanding(self, requests: Sequence[Request]) -> list[int]:
        """Pages the requests may still take, per cache group."""
        totals = [0] * len(self._store.groups)
        for request in requests:
            for index, room in enumerate(request.rooms):
                totals[index] += max(0, room - (request.tables[index].held if request.tables else 0))
        return totals

    def capacity(self, yielding: bool) -> list[int]:
        """Pages that are free, can be grown, or if `yielding` be taken from unprotected requests, per cache group."""
        coming = self._scheduler.freed([r for r in self._scheduler.running if yielding and not r.protected])
        return [
            limit - pool.used + count
            for limit, pool, count in zip(self._store.limits(), self._scheduler.pools, coming, strict=True)
        ]

    def does_not_fit(self, requests: Sequence[Request]) -> OutOfPages:
        """The error of requests that cannot have the pages they need; it says what fits."""
        size, rows = self._store.page_size, len(requests)
        limits = self._store.limits()
        held = [[table.held for table in request.tables] or [0] * len(limits) for request in requests]
        rooms = [
            [max(pair) for pair in zip(request.rooms, own, strict=True)]
            for request, own in zip(requests, held, strict=True)
        ]
        wanted = [sum(room[index] for room in rooms) for index in range(len(limits))]
        worst = max(range(len(wanted)), key=lambda index: wanted[index] / max(1, limits[index]))
        limit, longest = limits[worst], max(room[worst] for room in rooms)
        free = max(0, limit - self._scheduler.pools[worst].used + sum(own[worst] for own in held))
        budget = self._config.kv_cache
        allowed = (
            f"max_tokens={budget.max_tokens}" if budget.max_tokens else f"memory_fraction={budget.memory_fraction}"
        )
        fits = [f"{free // longest} row(s) of this length"] if free >= longest else []
        each = max(1, free // rows) * size
        what = "prompt and new tokens together" if self._evictor is None else "as many as are held at one time"
        fits += [f"{min(rows, free)} row(s) of {each} tokens, {what}"] if free else []
        return OutOfPages(
            f"{rows} row(s) need {wanted[worst]} pages of {size} tokens, the KV cache's budget ({allowed}) has "
            f"{free} left. What fits: {', or '.join(fits) or 'nothing'}. {self._advice()}, or raise "
            "KVCacheConfig(max_tokens=..., memory_fraction=...)."
        )

    def _advice(self) -> str:
        """What to lower so that a row needs fewer pages."""
        if self._evictor is None:
            return "Lower max_new_tokens or the number of rows"
        name = f"eviction={self._config.kv_cache.eviction!r}"
        if self._evictor.scored is not None:
            return (
                f"{name} holds all of a prompt until its end: shorten it, or lower max_new_tokens, keep_tokens, "
                "keep_ratio or the number of rows"
            )
        return (
            f"{name} holds keep_tokens and the tokens of a pass, however long a row is: lower "
            "KVCacheConfig(keep_tokens=...), BatchingConfig(max_batch_tokens=...) or the number of rows"
        )
