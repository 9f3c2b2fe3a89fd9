"""Which spans the next step computes (no torch here).

One rule: every request's computed tokens catch up with its tokens. A prompt, a chunk of a prompt and a decode differ
only in how many tokens are missing, and share one token budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import OutOfPages
from ..kv_cache.pool import PagePool
from .request import Request


class Prompts(Protocol):
    """What the scheduler needs of the prompt cache."""

    def find(self, request: Request) -> None:
        """Give a request the pages that hold the beginning of its tokens, and count those as computed."""
        ...

    def withdraw(self, request: Request) -> None:
        """The request is about to lose its pages."""
        ...


@dataclass
class Plan:
    """What one step does.

    Attributes:
        spans: Pairs (request, length), shortest first.
        wipes: Per cache group, pages to zero before anything else: preempted requests left them.
        copies: Per cache group, pages (from, to) to copy before anything is written.
    """

    spans: list[tuple[Request, int]] = field(default_factory=list)
    wipes: list[list[int]] = field(default_factory=list)
    copies: list[list[tuple[int, int]]] = field(default_factory=list)


class Scheduler:
    """Picks spans, and takes pages for them.

    Args:
        pools: The page pool of each cache group.
        max_batch_tokens: Most tokens in a step.
        max_requests: Most unprotected requests that hold pages at one time.
        grow: Called with the free pages each pool should have; may enlarge the pools.
        prompts: Where a request's pages may be found, or `None`.
    """

    def __init__(
        self,
        pools: Sequence[PagePool],
        max_batch_tokens: int,
        max_requests: int,
        grow: Callable[[Sequence[int]], None],
        prompts: Prompts | None = None,
    ) -> None:
        self.pools = pools
        self.grow = grow
        self.prompts = prompts
        self.max_batch_tokens = max_batch_tokens
        self.max_requests = max_requests
        self.requests: list[Request] = []  # in order of arrival

    def add(self, request: Request) -> None:
        """Let a request take part in the steps that follow."""
        self.requests.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out and give its pages back; harmless if it is not in."""
        if request in self.requests:
            self.requests.remove(request)
        request.finished = True
        request.release()

    def schedule(self) -> Plan:
        """Choose the next step's spans and reserve their pages."""
        plan = Plan(wipes=[[] for _ in self.pools], copies=[[] for _ in self.pools])
        budget = self.max_batch_tokens
        ready = [request for request in self.requests if request.remaining and not request.finished]
        # Protected requests come first: they cannot be preempted, so everybody else must be able to give way to them.
        ready.sort(key=lambda request: (not request.protected, request.remaining > 1))
        owed = sum(request.remaining == 1 for request in ready)  # a long prompt must not stall those who decode
        self._find(ready)
        for request in ready:
            if budget <= 0:
                break
            owed -= request.remaining == 1
            if not self._may_start(request) or self._awaits_parent(request):
                continue
            length = request.next_span(budget if request.remaining == 1 else max(1, budget - owed))
            if self._reserve(request, length, plan):
                plan.spans.append((request, length))
                budget -= length
        plan.spans.sort(key=lambda span: span[1])
        return plan

    def _find(self, ready: Sequence[Request]) -> None:
        """Look up whoever may start in this step. Found pages are filled now, so nothing may be planned for any yet."""
        budget = self.max_batch_tokens if self.prompts is not None else 0
        for request in ready:
            if budget <= 0:
                return
            if not self._may_start(request) or self._awaits_parent(request):
                continue
            if self.prompts is not None and not request.computed:
                self.prompts.find(request)
            budget -= request.next_span(budget)

    def _may_start(self, request: Request) -> bool:
        if request.protected or request.pages_held:
            return True
        holders = sum(1 for other in self.requests if other.pages_held and not other.protected)
        return holders < self.max_requests

    def _awaits_parent(self, request: Request) -> bool:
        """Share the parent's pages once it has computed all but the last prompt token; `True` while it has not.

        The last token is computed by each request itself: it needs its own logits.
        """
        parent = request.parent
        if parent is None or request.computed:
            return False
        wanted = len(request.tokens) - 1
        if parent.finished or wanted <= 0:
            request.parent = None
            return False
        if parent.computed < wanted:
            return True
        request.parent = None
        request.tables = [table.fork() for table in parent.tables]
        for table in request.tables:
            table.crop(wanted)
        request.computed = request.cached_tokens = wanted
        return False

    def _reserve(self, request: Request, length: int, plan: Plan) -> bool:
        """Take the span's pages; preempt newer, unprotected requests while there are too few. `False` if that fails."""
        start = request.computed
        while True:
            try:
                for copies, table in zip(plan.copies, request.tables, strict=True):
                    copies += table.reserve(start, start + length)
            except OutOfPages:
                needs = [table.missing(start, start + length) for table in request.tables]
                self.grow(needs)
                if all(need <= pool.free for need, pool in zip(needs, self.pools, strict=True)):
                    continue
                victim = self._victim(request, plan)
                if victim is None:
                    return False
                if self.prompts is not None:
                    self.prompts.withdraw(victim)
                for wipes, table in zip(plan.wipes, victim.tables, strict=True):
                    wipes += table.own()
                victim.release()
                victim.preemptions += 1
            else:
                return True

    def _victim(self, request: Request, plan: Plan) -> Request | None:
        scheduled = {other for other, _ in plan.spans}
        for other in reversed(self.requests):
            if not request.protected and other.arrival <= request.arrival:
                return None
            if other.pages_held and not other.protected and other not in scheduled:
                return other
        return None
