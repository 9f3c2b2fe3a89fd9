"""Which spans the next step computes (no torch here).

One rule: every request's computed tokens catch up with its tokens. A prompt, a chunk of a prompt and a decode differ
only in how many tokens are missing, and share one token budget.

Requests that were submitted wait in a line until a place and pages for all of their tokens are free. Nobody passes the
first in the line, and nobody starts while one that runs lacks pages: so none starves. Who runs may lose its pages to a
request of lower rank; it goes back into the line, its keys to host memory or away.

What past requests computed is looked up when it is a request's turn to start; if it does not fit all the same, it gives
that back: who waits holds no pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from ..kv_cache.pool import BlockTable, PagePool
from .policy import Policy
from .request import Request


class Prompts(Protocol):
    """What the scheduler needs of the prompt cache."""

    def find(self, request: Request, settle: Callable[[], None]) -> None:
        """Give a request the pages that hold the beginning of its tokens, and count those as computed.

        `settle` is called before pages are written to: it does what was planned for them.
        """
        ...

    def withdraw(self, request: Request) -> list[list[int]]:
        """The request is about to lose its pages; returns free pages, per cache group, that have to be zeroed."""
        ...


@dataclass
class Plan:
    """What one step does, in this order.

    Attributes:
        saves: Preempted requests whose keys go to host memory, with their pages per cache group.
        copies: Per cache group, pages (from, to) to copy, all at once.
        wipes: Per cache group, pages to zero unless they were copied to: preempted requests left them.
        restores: Requests whose keys come back from host memory.
        spans: Pairs (request, length), shortest first.
        preempted: Requests that lost their pages; they do not start again in this step.
    """

    saves: list[tuple[Request, list[list[int]]]] = field(default_factory=list)
    copies: list[list[tuple[int, int]]] = field(default_factory=list)
    wipes: list[list[int]] = field(default_factory=list)
    restores: list[Request] = field(default_factory=list)
    spans: list[tuple[Request, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Picks spans, and takes pages for them.

    Args:
        pools: The page pool of each cache group.
        policy: The line of those who wait.
        max_batch_tokens: Most tokens in a step.
        max_requests: Most requests that hold pages at one time, rows of `generate` calls not counted.
        tables: Makes the empty block tables of a request that starts.
        grow: Called with the free pages each pool should have; may enlarge the pools.
        saves: Whether the keys of a request that loses its pages are to be saved instead of computed again.
        settle: Does what a plan says about pages, and takes it out of the plan.
        prompts: Where a request's pages may be found, or `None`.
    """

    def __init__(
        self,
        pools: Sequence[PagePool],
        policy: Policy,
        max_batch_tokens: int,
        max_requests: int,
        tables: Callable[[Request], list[BlockTable]],
        grow: Callable[[Sequence[int]], None],
        saves: Callable[[Request], bool],
        settle: Callable[[Plan], None] = lambda plan: None,
        prompts: Prompts | None = None,
    ) -> None:
        self.pools = pools
        self.line = policy
        self.prompts = prompts
        self.max_batch_tokens = max_batch_tokens
        self.max_requests = max_requests
        self.running: list[Request] = []
        self._tables = tables
        self._grow = grow
        self._saves = saves
        self._settle = settle
        self._arrivals = count()

    def add(self, request: Request) -> None:
        """Let a request take part in the steps that follow: at once if it has its tables, else from the line."""
        # Not when it was made: on ranks of a sharded model threads prepare requests in orders of their own.
        request.arrival = next(self._arrivals)
        if request.tables:
            self.running.append(request)
        else:
            self.line.push(request)

    def remove(self, request: Request) -> None:
        """Take a request out and give its pages back; harmless if it is not in."""
        if request in self.running:
            self.running.remove(request)
        self.line.discard(request)
        request.finished = True
        request.release()

    def schedule(self) -> Plan:
        """Choose the next step's spans and reserve their pages."""
        plan = Plan(wipes=[[] for _ in self.pools], copies=[[] for _ in self.pools])
        budget = self.max_batch_tokens
        if self.line.preempts:
            self._make_way(plan)
        ready = [r for r in self.running if r.remaining and r.error is None and not r.held]
        # Protected requests come first: they cannot be preempted, so everybody else must be able to give way to them.
        ready.sort(key=lambda request: (not request.protected, not request.decodes, self.line.rank(request)))
        owed = sum(request.remaining for request in ready if request.decodes)  # a long prompt must not stall these
        self._find([request for request in ready if not request.computed], plan)
        short = False  # somebody who runs lacks pages
        for request in ready:
            if budget <= 0:
                break
            if request.decodes:
                owed -= request.remaining
            if request in plan.preempted or self._awaits_parent(request):
                continue
            if request.drafted and (request.remaining > budget or not self._free_for(request)):
                request.retract()  # drafts are computed where there is room, and take it from nobody
            length = request.next_span(budget if request.decodes else max(1, budget - owed))
            held = self._reserve(request, request.brought if request.awaits_keys else length, plan)
            short |= not held
            budget -= self._plan_span(request, length, plan) if held and not request.awaits_keys else 0
        if not short:
            self._start_waiting(budget, plan)
        plan.spans.sort(key=lambda span: span[1])
        return plan

    def _plan_span(self, request: Request, length: int, plan: Plan) -> int:
        plan.spans.append((request, length))
        end = request.computed + length
        if not request.protected:  # found and shared tokens are nobody's work
            self.line.served(request, min(length, max(0, end - request.charged)))
        request.charged = max(request.charged, end)
        return length

    def _find(self, starting: Sequence[Request], plan: Plan) -> None:
        """Look up whoever starts in this step, before others of the step take the pages that were kept for it."""
        budget = self.max_batch_tokens
        for request in starting:
            if budget <= 0:
                return
            if not self._awaits_parent(request):
                self._look_up(request, plan)
                budget -= request.next_span(budget)

    def _look_up(self, request: Request, plan: Plan) -> None:
        if self.prompts is not None and not request.computed:
            request.tables = request.tables or self._tables(request)
            self.prompts.find(request, lambda: self._settle(plan))

    def _forget(self, request: Request) -> None:
        """A request that was looked up does not start: it waits on, and holds nothing."""
        if self.prompts is not None:
            self.prompts.withdraw(request)
        request.release()
        request.evicted = 0
        if not request.preemptions:
            request.cached_tokens = 0

    def _start_waiting(self, budget: int, plan: Plan) -> None:
        aside: list[Request] = []
        places = self.places()
        while budget > 0 and places > 0 and (request := self.line.first()) is not None:
            if request in plan.preempted:
                break
            parent = request.parent
            if self._awaits_parent(request):
                self.line.discard(request)
                aside.append(request)  # the one exception: who waits for a parent's pages lets others pass
                continue
            self._look_up(request, plan)
            if not self._fits(request):
                if not request.tables:
                    break
                self._forget(request)
                request.parent = parent
                if not self._fits(request):  # with empty tables: what is found may need a page more, for a copy
                    break
            self.line.discard(request)
            request.tables = request.tables or self._tables(request)
            self.running.append(request)
            if request.swapped is not None:
                plan.restores.append(request)
            length = request.next_span(budget)
            if not self._reserve(request, length, plan):
                raise AssertionError("a request that fits found no pages")
            budget -= self._plan_span(request, length, plan)
            places -= 1
        for request in aside:
            self.line.push(request)

    def places(self) -> int:
        """How many more submitted requests may hold pages."""
        return self.max_requests - sum(not r.protected or bool(r.group and r.group.submitted) for r in self.running)

    def _fits(self, request: Request) -> bool:
        """Whether pages for all of its tokens are free, and one for everybody who runs and may soon need one.

        Without that margin a request would start only to be preempted in the next steps.
        """
        needs = self._needs(request)
        for index in range(len(needs)):
            growing = [r for r in self.running if not r.protected and r.rooms[index] > r.tables[index].held]
            needs[index] += len(growing)
        self._grow(needs)
        return all(need <= pool.free for need, pool in zip(needs, self.pools, strict=True))

    def _needs(self, request: Request) -> list[int]:
        """Pages that a waiting request needs for all of its tokens, per cache group, beside those that were found."""
        tables, start = request.tables or self._tables(request), request.computed
        return [
            min(room, table.missing(start, request.ends_at(len(request.tokens))))
            for room, table in zip(request.rooms, tables, strict=True)
        ]

    def freed(self, requests: Sequence[Request]) -> list[int]:
        """Pages that come back, per cache group, if all of these give way: those that nobody else holds."""
        freed = []
        for index, pool in enumerate(self.pools):
            holders = Counter(page for request in requests for page in request.tables[index].pages if page)
            freed.append(sum(held == pool.refs(page) for page, held in holders.items()))
        return freed

    def _make_way(self, plan: Plan) -> None:
        """The first in the line takes the place and the pages of those who run and rank behind it."""
        first = self.line.first()
        behind = [] if first is None else self._behind(first, plan)
        if first is None or not behind:
            return
        if first.parent is None:
            self._look_up(first, plan)
        needs, freed = self._needs(first), self.freed(behind)
        # Otherwise others hold so much that nobody's pages would help.
        if all(need <= pool.free + count for need, pool, count in zip(needs, self.pools, freed, strict=True)):
            while not (self.places() > 0 and self._fits(first)):
                victim = self._victim(first, plan)
                if victim is None:
                    break
                self._preempt(victim, plan)
        if first.tables:
            self._forget(first)  # it is looked up again when it starts

    def _awaits_parent(self, request: Request) -> bool:
        """Share the parent's pages once it has computed all but the last prompt token; `True` while it has not.

        The last token is computed by each request itself: it needs its own logits.
        """
        parent = request.parent
        if parent is None or request.computed:
            return False
        wanted = len(request.tokens) - 1
        lost = request.selection is not None and parent.selection is None  # evicted from
        lost |= any(t.settled > wanted or (t.passed and parent.computed > wanted + 1) for t in parent.tables)
        if parent.finished or wanted <= 0 or lost:
            request.parent = None
            return False
        if parent.computed < wanted or not parent.tables:
            return True
        request.parent = None
        request.tables = [table.fork() for table in parent.tables]
        for table in request.tables:
            table.crop(wanted)
        request.computed = request.cached_tokens = wanted
        request.evicted = parent.evicted
        if request.selection is not None and parent.selection is not None:
            request.selection.join(parent.selection)
        return False

    def _free_for(self, request: Request, length: int | None = None) -> bool:
        """Whether pages for a request's next tokens are free, all tokens by default."""
        start = request.computed
        stop = request.ends_at(len(request.tokens) if length is None else start + length)
        needs = [table.missing(start, stop) for table in request.tables]
        if any(need > pool.blank for need, pool in zip(needs, self.pools, strict=True)):
            self._grow(needs)  # before kept pages are given up, and those of others
        return all(need <= pool.free for need, pool in zip(needs, self.pools, strict=True))

    def _reserve(self, request: Request, length: int, plan: Plan) -> bool:
        """Take the span's pages, from requests that rank behind if too few are free. `False` if that fails."""
        start, stop = request.computed, request.ends_at(request.computed + length)
        while not self._free_for(request, length):
            victim = self._victim(request, plan)
            if victim is None:
                return False
            self._preempt(victim, plan)
        for copies, table in zip(plan.copies, request.tables, strict=True):
            # All copies happen at once: what will be in a page that is itself copied to, its source has.
            sources = {target: source for source, target in copies}
            copies += [(sources.get(source, source), target) for source, target in table.reserve(start, stop)]
        return True

    def _behind(self, request: Request, plan: Plan) -> list[Request]:
        """Who may lose its pages to `request`, because it ranks behind and is not needed in this step."""
        scheduled = {other for other, _ in plan.spans}
        rank = self.line.rank(request)
        return [
            other
            for other in self.running
            # Logits that wait to be read would be lost with the pages.
            if not other.protected and other.pages_held and other.logits is None and other not in scheduled
            if request.protected or self.line.rank(other) > rank
        ]

    def _victim(self, request: Request, plan: Plan) -> Request | None:
        return max(self._behind(request, plan), key=self.line.rank, default=None)

    def _preempt(self, victim: Request, plan: Plan) -> None:
        victim.retract()
        # What it holds and one page more is what it needs to go on, however long it has become.
        victim.rooms = [max(room, table.held + 1) for room, table in zip(victim.rooms, victim.tables, strict=True)]
        saved = victim.evicted > 0 or self._saves(victim)  # what was evicted would be there again
        if saved:
            ends = [-(-(victim.computed - table.evicted) // table.page_size) for table in victim.tables]
            pages = [list(table.pages[:end]) for end, table in zip(ends, victim.tables, strict=True)]
            plan.saves.append((victim, pages))
            victim.swaps += 1
        if self.prompts is not None:
            for wipes, freed in zip(plan.wipes, self.prompts.withdraw(victim), strict=True):
                wipes += freed
        for wipes, table in zip(plan.wipes, victim.tables, strict=True):
            wipes += table.own()
        if saved:
            victim.leave_pages()
        else:
            victim.release()
        victim.preemptions += 1
        plan.preempted.append(victim)
        self.running.remove(victim)
        self.line.push(victim)
