"""The loop: plan a step, run it, hand out the logits. The page to read first.

```
schedule: spans and pages ─▶ run: one forward pass ─▶ settle: logits to requests, passed pages back
```

Who decides what follows a request's logits is its group's business (`generation/group.py`, the rows of one call): the
engine only computes tokens that requests have and whose keys are missing.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter

from transformers import PreTrainedModel

from ..config import LLMOptConfig
from ..errors import LLMOptError, OutOfPages, RequestFailed, UnsupportedModel
from ..kv_cache import Clock, PagedStore
from ..prompt_cache import PromptCache
from ..speculative import Speculator
from .budget import Budget
from .drafters import make_speculator
from .evict import Evictor
from .mover import Mover
from .parallel import alike, ranks_of
from .policy import policy_of
from .probe import probe
from .proof import prove
from .request import Request, Rows, Share
from .runner import Runner
from .scheduler import Plan, Scheduler
from .whole import unlike_states


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
        self.lock = lock
        layout = probe(model)
        self.store = PagedStore(layout.layers, config.kv_cache, layout.dense, layout.reads_columns)
        reserves = config.kv_cache.max_tokens is not None
        self.ranks = ranks_of(model)  # of a model that is sharded over processes
        if self.ranks is not None:
            config = alike(config, self.ranks, self.store)
            self.store = PagedStore(layout.layers, config.kv_cache, layout.dense, layout.reads_columns)
        self.config = config
        if layout.states and (reason := unlike_states(config, layout.dense, self.ranks is not None)):
            raise UnsupportedModel(f"{type(model).__name__} keeps recurrent states, and {reason}")
        self.evictor = Evictor(self.store, config.kv_cache) if config.kv_cache.eviction is not None else None
        self.mover = Mover(self.store, config.batching, self.evictor)
        scored = self.evictor.scored if self.evictor is not None else None
        self.runner = Runner(model, self.store, config, scored, layout.states, self.ranks)
        prove(self.runner)
        keeps = config.prompt_cache if not layout.states else None
        self.prompts = PromptCache(model, self.store, keeps, self.runner.anybody) if keeps else None
        self.scheduler = Scheduler(
            [group.pool for group in self.store.groups],
            policy_of(config.batching),
            config.batching.max_batch_tokens,
            config.batching.max_requests,
            self.mover.tables,
            self._grow,
            self.mover.saves,
            self.mover.move,
            self.prompts,
        )
        self.budget = Budget(self.store, config, self.scheduler, self.evictor)
        # What a state has read cannot be taken back, so nothing is guessed.
        self.speculator = None if layout.states else make_speculator(self.runner, config, EngineLoop)
        # Why nothing is guessed, where somebody was asked to guess.
        self.undrafted = "a recurrent state cannot take back what it has read" if layout.states else None
        overlap = config.batching.overlap
        self.overlaps = self.runner.device.type != "cpu" if overlap is None else overlap
        self.overlaps &= self.speculator is None  # drafts follow tokens that are known
        self.on_step: Callable[[Plan, float], None] | None = None  # called with each plan and when its step began
        self.groups: dict[Rows, None] = {}  # in order of arrival
        # Passes that nobody was told about: their clocks, tokens, what groups share of them, and attention paths.
        self._passes: deque[tuple[list[Clock], int, list[Share], set[str]]] = deque()
        self.owners = 0  # open `Engine` objects that submit here
        self.steps = 0
        if self.runner.graphs is not None and reserves:
            self._grow(self.store.limits())  # pages that are added later move all others, and end every graph

    def refresh(self) -> None:
        """Look at the model again: modules may have been exchanged, adapted or hooked since the last call.

        Raises:
            UnsupportedModel: The model, as it is now, cannot be served.
        """
        if self.runner.refresh():
            prove(self.runner)

    def add(self, group: Rows) -> bool:
        """Admit a group: rows of a `generate` call start at once, others wait in the line for their turn.

        Returns:
            `False` if it must wait until others have given pages back.

        Raises:
            OutOfPages: It can never fit; the message says what does.
        """
        members = group.requests
        if any(request.protected for request in members) and not self.budget.provide(group, self.groups):
            return False
        for request in members:
            request.group = group
            self.scheduler.add(request)
        self.groups[group] = None
        return True

    def _grow(self, pages: Sequence[int]) -> None:
        with suppress(OutOfPages):  # the device is full: the scheduler sees that too few pages are free
            self.store.provide(pages)

    def remove(self, group: Rows) -> None:
        """Take a group out, finished or not, and give all of its pages back."""
        for request in group.requests:
            if not request.finished:
                self._abandon(request)
            self.settle_drafts(request)
            # They refer back to the group.
            request.group = request.on_prompt = request.most_drafts = request.guess = None
        self.groups.pop(group, None)
        self.lock.notify_all()

    def finish(self, request: Request) -> None:
        """A request needs no further token: its pages go back."""
        self.settle_drafts(request)
        if self.prompts is not None and request in self.scheduler.running:
            self.prompts.finish(request)
        self.scheduler.remove(request)
        self.lock.notify_all()

    def settle_drafts(self, request: Request) -> None:
        """A request takes no further token: what was guessed beyond is forgotten, and what was right is counted."""
        request.retract()
        self._close_ranks([request])
        if self.speculator is not None:
            for table in request.tables:
                table.crop(request.computed)  # nobody writes any more where guesses were wrong
            try:
                self.speculator.forget(request)
            except Exception as error:
                self._stop_drafting(error)

    def _abandon(self, request: Request) -> None:
        """A request that failed or was cancelled leaves clean pages."""
        stale: list[list[int]]
        stale = [[] for _ in self.store.groups] if self.prompts is None else self.prompts.withdraw(request)
        for pages, table in zip(stale, request.tables, strict=False):
            pages += table.own()
        for index, pages in enumerate(stale):
            if pages:
                self.store.wipe(index, pages)
        self.mover.drop_saved(request)
        self.scheduler.remove(request)

    def step(self) -> bool:
        """Compute one step for whoever has missing tokens; `False` if nobody can be served now. Call without grad."""
        self.store.reclaim()
        self._close_ranks(self.scheduler.running)
        if self.prompts is not None:
            self.prompts.begin_step()
        if self.speculator is not None:
            self._draft(self.speculator)
        plan = self.scheduler.schedule()
        began = perf_counter()
        self.mover.move(plan)
        if not plan.spans:
            held = any(request.held for request in self.scheduler.running)
            if held:
                self._evict()
            elif not plan.preempted:
                self._starve()
            return held or bool(plan.preempted)
        try:
            self._run(plan.spans)
        except Exception as failure:
            self._find_fault(plan.spans, failure)
        self._evict()
        self.account()
        self.steps += 1
        if self.on_step is not None:
            self.on_step(plan, began)
        self.lock.notify_all()
        return True

    def _find_fault(self, spans: Sequence[tuple[Request, int]], failure: Exception) -> None:
        """Whose fault a pass was shows when each group's spans run alone."""
        if self.runner.states:  # some may have been written to: nobody can go on from them
            self._fail([request for request, _ in spans], failure)
            return
        for group in {request.group: None for request, _ in spans if request.group is not None}:
            own = [span for span in spans if span[0].group is group]
            if any(request.half_seen for request, _ in own):
                self._fail(group.requests, failure)
                continue
            try:
                self._run(own)
            except Exception as error:
                self._fail(group.requests, error)

    def _draft(self, speculator: Speculator) -> None:
        """Guess what follows the last tokens of requests, which the next step computes."""
        wanted = [
            (request, request.most_drafts())
            for request in self.scheduler.running
            if request.most_drafts is not None and request.may_draft
        ]
        if not wanted:
            return
        try:
            speculator.draft([request for request, _ in wanted], [limit for _, limit in wanted])
        except Exception as error:
            for request, _ in wanted:
                request.retract()
            self._stop_drafting(error)

    def _stop_drafting(self, error: Exception) -> None:
        """Who guesses, a draft model, say, or a drafter of the user, failed: whoever generates can do without."""
        self.speculator = self.runner.taps = None
        what = f"{type(error).__name__}: {error}"
        self.undrafted = f"whoever guessed failed ({what}); llmopt.release() starts anew"
        for group in self.groups:
            if any(request.most_drafts is not None for request in group.requests):
                group.stats.undrafted = self.undrafted
        warnings.warn(f"llmopt: nothing is guessed any more: {what}", stacklevel=3)

    def _close_ranks(self, requests: Sequence[Request]) -> None:
        """The keys of drafts that were confirmed move to where their tokens stand now."""
        moving = [request for request in requests if request.moves]
        for index in range(len(self.store.groups)) if moving else ():
            places: list[tuple[int, int]] = []
            for request in moving:
                sources, targets = (request.tables[index].slots(tokens) for tokens in zip(*request.moves, strict=True))
                places += zip(sources, targets, strict=True)
            self.store.move(index, places)
        for request in moving:
            if self.runner.taps is not None:
                self.runner.taps.move(request, request.moves)
            request.moves.clear()

    def _run(self, spans: Sequence[tuple[Request, int]]) -> None:
        """One pass over these spans, and what follows from it."""
        if not spans:
            return
        paths: set[str] = set()
        before = self.runner.replays
        results, clocks = self.runner.run(spans, paths.add)
        replayed = self.runner.replays > before
        self._settle(spans)
        some = {request.group: request for request, _ in spans if request.group is not None}
        shares = [Share(group, row, row.computed, self.mover.held(group), replayed) for group, row in some.items()]
        self._passes.append((clocks, sum(length for _, length in spans), shares, paths))
        for request, logits in results:
            request.logits, *request.later = logits
            if request.group is not None:
                request.group.notice()

    def account(self) -> None:
        """Tell groups what the passes cost that the device is done with."""
        while self._passes:
            clocks, tokens, shares, paths = self._passes[0]
            times = [seconds for clock in clocks if (seconds := clock.seconds()) is not None]
            if len(times) < len(clocks):
                return
            self._passes.popleft()
            self.mover.costs.computed(tokens, sum(times))
            for share in shares:
                if share.group in self.groups:  # not yet ended
                    share.group.account(sum(times), paths, share)

    def _starve(self) -> None:
        """Nobody could be scheduled: if nobody is about to go on by itself either, somebody has to fail.

        That is the newest of those who run, or, if nobody runs, the first in the line: all others wait for it.
        """
        running = {request.group: None for request in self.scheduler.running if request.group is not None}
        brings = {group for group in running if any(request.awaits_keys for request in group.requests)}
        ready = {group for group in brings if self.budget.provided(group)}  # will start by itself
        waiting = [g for g in running if g not in ready and any(request.remaining for request in g.requests)]
        first = self.scheduler.line.first()
        unread = any(request.pending is not None for request in self.scheduler.running)  # may be what ends it
        if unread or len(waiting) < len(running) or not (waiting or first):
            return  # a group that waits for no page will choose its next tokens, and may end
        group = waiting[-1] if waiting else first.group if first is not None else None
        assert group is not None
        self._fail(group.requests, self.budget.does_not_fit(group.requests))

    def _settle(self, spans: Sequence[tuple[Request, int]]) -> None:
        """Count what was computed, drop masked tails, and give back pages that windows have passed."""
        if self.prompts is not None:
            self.prompts.watch()
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
                    table.trim(group.first_visible(max(0, request.known - 1)))

    def _evict(self) -> None:
        """Take away what requests must not hold longer."""
        if self.evictor is None:
            return
        awaited = {request.parent for group in self.groups for request in group.requests if request.parent is not None}
        running = [request for request in self.scheduler.running if request.tables and request.error is None]
        for request, error in self.evictor.settle(running, awaited, self.runner, self._grow):
            self._fail([request], error)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """The forward pass raised: its requests fail, and the engine serves the next."""
        for request in requests:
            if request.finished:
                continue
            request.error = error if isinstance(error, LLMOptError) else RequestFailed.from_forward(error)
            if request.pending is None:  # else the unread token may have been its last: its owner will know
                self._abandon(request)
            if request.group is not None:
                request.group.notice()
        self.lock.notify_all()
