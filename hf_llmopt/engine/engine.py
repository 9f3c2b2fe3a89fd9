"""The loop: plan a step, run it, hand out the logits. The page to read first.

```
schedule: spans and pages ─▶ run: one forward pass ─▶ settle: logits to requests, passed pages back
```

Who decides what follows a request's logits is its group's business (`generation/group.py`, the rows of one call): the
engine only computes tokens that requests have and whose keys are missing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel

from ..config import LLMOptConfig
from ..errors import LLMOptError, OutOfPages, RequestFailed
from ..kv_cache import PagedStore
from ..prompt_cache import PromptCache
from .probe import probe
from .request import Request
from .runner import Runner
from .scheduler import Scheduler

AHEAD = 1024  # new tokens that pages are set aside for when a request is admitted


class Rows(Protocol):
    """What the engine needs of a group: its requests, and a place for figures."""

    requests: list[Request]
    thread: int  # who waits for it

    def account(self, seconds: float, paths: set[str]) -> None:
        """A step that computed some of the group's tokens took the model `seconds`, through these attention paths."""
        ...


class EngineLoop:
    """Steps the requests of all callers of one model and config.

    Every method that touches requests or pages is called with `lock` held. Threads take turns: whoever needs logits
    steps the engine for all.

    Args:
        model: A causal language model; held weakly.
        config: What the caller asked for.
        lock: Shared by all engines of the model, since they share its attention implementation.

    Raises:
        UnsupportedModel: The model cannot be served.
    """

    def __init__(self, model: PreTrainedModel, config: LLMOptConfig, lock: threading.Condition) -> None:
        self.config = config
        self.lock = lock
        layout = probe(model)
        self.store = PagedStore(layout.layers, config.kv_cache, layout.dense, layout.reads_columns)
        self.runner = Runner(model, self.store, config)
        self.prompts = PromptCache(model, self.store, config.prompt_cache) if config.prompt_cache else None
        self.scheduler = Scheduler(
            [group.pool for group in self.store.groups],
            config.batching.max_batch_tokens,
            config.batching.max_requests,
            self.store.provide,
            self.prompts,
        )
        self.groups: list[Rows] = []
        self.owners = 0  # open `Engine` objects that submit here
        self.steps = 0

    def rooms(self, prompt: int, total: int, keeps_passed: bool = False) -> list[int]:
        """Pages to set aside for a request, per cache group.

        All it can ever need under an explicit budget in tokens, so that it cannot fail half-way. Under a budget in
        memory only what it needs soon: a large `max_new_tokens` is seldom used up, and pools grow.

        Args:
            prompt: Tokens of the prompt.
            total: Tokens of prompt and continuation at most.
            keeps_passed: Whether pages behind windows are kept.
        """
        size = self.store.page_size
        if self.config.kv_cache.max_tokens is None:
            total = min(total, prompt + AHEAD)
        span = total if keeps_passed else min(total, self.config.batching.max_batch_tokens)
        return [group.pages_for(total, size, span) for group in self.store.groups]

    def add(self, group: Rows) -> bool:
        """Admit a group.

        Returns:
            `False` if it must wait until others have given pages back.

        Raises:
            OutOfPages: It can never fit; the message says what does.
        """
        self.check_fits(group)
        self.runner.refresh()
        wanted, members = self._outstanding(group.requests), group.requests
        protected = any(request.protected for request in members)
        running = self.scheduler.requests
        others = self._outstanding([request for request in running if request.protected or not protected])
        # Rows of one group get equal room, so that their runs of pages lie at equal distances.
        spacing = [max(request.rooms[index] for request in members) for index in range(len(wanted))]
        self.store.provide([len(members) * a + b for a, b in zip(spacing, others, strict=True)])
        if protected and any(a + b > c for a, b, c in zip(wanted, others, self._capacity(), strict=True)):
            # Pages that are held by the caller's own caches, or by calls that this one is nested in, will not come
            if all(other.thread == group.thread for other in self.groups):
                raise self._does_not_fit(members)
            return False
        for request in members:
            if not request.tables:
                request.tables = self.store.tables(spacing)
            self.scheduler.add(request)
        self.groups.append(group)
        return True

    def check_fits(self, group: Rows) -> None:
        """Refuse a group that the budget can never hold.

        Requests that may be preempted need not fit beside one another: each must fit alone.

        Raises:
            OutOfPages: It can never fit; the message says what does.
        """
        members = group.requests
        if all(n <= pool.free for n, pool in zip(self._outstanding(members), self.scheduler.pools, strict=True)):
            return
        for together in [members] if any(r.protected for r in members) else [[request] for request in members]:
            if any(n > limit for n, limit in zip(self._outstanding(together), self.store.limits(), strict=True)):
                raise self._does_not_fit(together)

    def _outstanding(self, requests: Sequence[Request]) -> list[int]:
        """Pages the requests may still take, per cache group."""
        totals = [0] * len(self.store.groups)
        for request in requests:
            for index, room in enumerate(request.rooms):
                totals[index] += max(0, room - (request.tables[index].held if request.tables else 0))
        return totals

    def _capacity(self) -> list[int]:
        """Pages that are free, can be grown, or can be taken from unprotected requests, per cache group."""
        yielding = [request for request in self.scheduler.requests if not request.protected]
        capacity = []
        for index, (limit, pool) in enumerate(zip(self.store.limits(), self.scheduler.pools, strict=True)):
            # A page comes back only when all who share it give way.
            holders = Counter(page for request in yielding for page in request.tables[index].pages if page)
            capacity.append(limit - pool.used + sum(count == pool.refs(page) for page, count in holders.items()))
        return capacity

    def _does_not_fit(self, requests: Sequence[Request]) -> OutOfPages:
        size, rows = self.store.page_size, len(requests)
        limits = self.store.limits()
        held = [[table.held for table in request.tables] or [0] * len(limits) for request in requests]
        rooms = [
            [max(pair) for pair in zip(request.rooms, own, strict=True)]
            for request, own in zip(requests, held, strict=True)
        ]
        wanted = [sum(room[index] for room in rooms) for index in range(len(limits))]
        worst = max(range(len(wanted)), key=lambda index: wanted[index] / max(1, limits[index]))
        limit, longest = limits[worst], max(room[worst] for room in rooms)
        free = max(0, limit - self.scheduler.pools[worst].used + sum(own[worst] for own in held))
        budget = self.config.kv_cache
        allowed = (
            f"max_tokens={budget.max_tokens}" if budget.max_tokens else f"memory_fraction={budget.memory_fraction}"
        )
        return OutOfPages(
            f"{rows} row(s) need {wanted[worst]} pages of {size} tokens, the KV cache's budget ({allowed}) has "
            f"{free} left. What fits: {free // longest} row(s) of this length, or {rows} row(s) of "
            f"{free // rows * size} tokens, prompt and new tokens together. Lower max_new_tokens or the number of "
            "rows, or raise KVCacheConfig(max_tokens=..., memory_fraction=...)."
        )

    def remove(self, group: Rows) -> None:
        """Take a group out, finished or not, and give all of its pages back."""
        for request in group.requests:
            if not request.finished:
                self._abandon(request)
        if group in self.groups:
            self.groups.remove(group)
        self.lock.notify_all()

    def finish(self, request: Request) -> None:
        """A request needs no further token: its pages go back."""
        if self.prompts is not None and request in self.scheduler.requests:
            self.prompts.finish(request)
        self.scheduler.remove(request)
        self.lock.notify_all()

    def _abandon(self, request: Request) -> None:
        """A request that failed or was cancelled leaves clean pages."""
        if self.prompts is not None:
            self.prompts.withdraw(request)
        for index, table in enumerate(request.tables):
            if pages := table.own():
                self.store.wipe(index, pages)
        self.scheduler.remove(request)

    def step(self) -> bool:
        """Compute one step for whoever has missing tokens; `False` if nobody can be served now. Call without grad."""
        self.store.reclaim()
        if self.prompts is not None:
            self.prompts.begin_step()
        plan = self.scheduler.schedule()
        if not plan.spans:
            self._starve()
            return False
        for index, (wipes, copies) in enumerate(zip(plan.wipes, plan.copies, strict=True)):
            if wipes:
                self.store.wipe(index, wipes)
            if copies:
                self.store.copy_pages(index, copies)
        try:
            self._run(plan.spans)
        except Exception:
            # Whose fault it was shows when each group's spans run alone.
            for group in list(self.groups):
                own = [span for span in plan.spans if span[0] in group.requests]
                try:
                    self._run(own)
                except Exception as error:
                    self._fail(group.requests, error)
        self.steps += 1
        self.lock.notify_all()
        return True

    def _run(self, spans: Sequence[tuple[Request, int]]) -> None:
        """One pass over these spans, and what follows from it."""
        if not spans:
            return
        paths: set[str] = set()
        results, seconds = self.runner.run(spans, paths.add)
        self._settle(spans)
        for request, logits in results:
            request.logits = logits
        members = {request for request, _ in spans}
        for group in self.groups:
            if not members.isdisjoint(group.requests):
                group.account(seconds, paths)

    def _starve(self) -> None:
        """Nobody could be scheduled: if nobody is about to go on by itself either, the newest group fails."""
        waiting = [group for group in self.groups if any(request.remaining for request in group.requests)]
        if not waiting or len(waiting) < len(self.groups):
            return  # a group that waits for no page will choose its next tokens, and may end
        for request in waiting[-1].requests:
            request.error = self._does_not_fit(waiting[-1].requests)
            self._abandon(request)
        self.lock.notify_all()

    def _settle(self, spans: Sequence[tuple[Request, int]]) -> None:
        """Count what was computed, drop masked tails, and give back pages that windows have passed."""
        for request, length in spans:
            request.computed += length
            if request.masked_tail and not request.remaining:
                request.tokens.pop()
                request.positions.pop()
                request.computed -= 1
                request.masked_tail = False
                if request.embeds is not None:
                    request.embeds = request.embeds[: request.computed]
            if self.prompts is not None:
                self.prompts.enter(request)
            for group, table in zip(self.store.groups, request.tables, strict=True):
                if group.kind != "full" and not request.keeps_passed:
                    # One token more than the next query needs, so that the last one can be computed again.
                    table.trim(group.first_visible(max(0, request.computed - 1)))

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """The forward pass raised: its requests fail, and the engine serves the next."""
        for request in requests:
            if request.finished:
                continue
            request.error = error if isinstance(error, LLMOptError) else RequestFailed.from_forward(error)
            self._abandon(request)
        self.lock.notify_all()
