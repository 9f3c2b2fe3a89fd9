"""Drafts for the requests of an engine: who guesses, how many guesses are computed, and how often they were right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from time import perf_counter
from typing import Any, Protocol

from .drafter import Draft, Drafter, Odds, Text, place
from .length import PassCosts, choose_lengths

LONGEST = 16  # drafts of a request in a step
FIRST = 0.5  # chance of a draft about whose grounds nothing is known yet
PRIOR = 2.0  # how many drafts that first guess weighs as much as
PLAIN = 32  # of so many steps one computes no guess: what that takes has to be known
REST = 16  # most steps in which nobody guesses, once guesses do not pay; then somebody looks again
MEMORY = 200.0  # drafts that are remembered for each grounds


class Request(Text, Protocol):
    """What is drafted for; the engine's `Request`."""

    drafted_tokens: int
    accepted_tokens: int

    def draft(self, tokens: Sequence[int]) -> None:
        """Take these guesses."""
        ...


@dataclass
class _Open:
    """Guesses whose outcome is not known yet, how many were computed, and where the first stands in the text."""

    draft: Draft
    computed: int
    start: int


class Speculator:
    """Drafts the tokens of requests.

    Args:
        drafter: Who guesses.
        measure: Returns the seconds of one pass over so many tokens.
        num_tokens: Drafts of a request in each step; `None` for as many as pay.
    """

    def __init__(self, drafter: Drafter, measure: Callable[[int], float], num_tokens: int | None) -> None:
        self.drafter = drafter
        self.num_tokens = num_tokens
        self._measure = measure
        self._costs: PassCosts | None = None
        self._open: dict[Request, _Open] = {}
        self._record: dict[Any, tuple[float, float]] = {}  # by grounds: drafts that were right, all drafts
        self._tokens, self._began = 0, 0.0  # of the last step
        self._steps = self._resting = self._rest = 0

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> None:
        """Give requests, which are about to compute their last token, the drafts that pay.

        Args:
            requests: All that take part in the next step and compute one token.
            limits: The most drafts each can use.
        """
        goes_on = any(request in self._open for request in requests)  # with what the last step computed
        for request in requests:
            self._settle(request)
        most = LONGEST if self.num_tokens is None else self.num_tokens
        limits = [min(most, limit) for limit in limits]
        rows = len(requests)
        if self.num_tokens is None:
            if self._costs is None:
                self._costs = PassCosts(self._measure)
            elif goes_on:
                self._costs.observe(self._tokens, perf_counter() - self._began)
            costs = self._costs
            self._steps += 1
            if self._resting or self._steps % PLAIN == 0:
                self._resting = max(0, self._resting - 1)
                limits = [0] * rows
            more, each = costs(rows + 1) - costs(rows), costs(rows) / rows  # seconds of a draft, and of a token
            drafts = self.drafter.propose(requests, limits, Odds(self._chance, lambda seconds: (seconds + more) / each))
            chances = [list(accumulate(map(self._chance, draft.grounds), mul)) for draft in drafts]
            lengths = choose_lengths(chances, costs)
            if any(lengths):
                self._rest = 0
            elif any(limits):
                self._resting = self._rest = min(REST, 2 * self._rest + 1)
        else:
            drafts = self.drafter.propose(requests, limits, Odds(self._chance, lambda seconds: 0.0))
            lengths = [len(draft.tokens) for draft in drafts]
        for request, draft, length in zip(requests, drafts, lengths, strict=True):
            self._open[request] = _Open(draft, length, len(request.tokens))
            request.draft(draft.tokens[:length])
        self._tokens, self._began = rows + sum(lengths), perf_counter()

    def forget(self, request: Request) -> None:
        """A request has ended; harmless if nothing was drafted for it."""
        self._settle(request)
        self.drafter.forget(request)

    def _chance(self, grounds: Any) -> float:
        right, tried = self._record.get(grounds, (0.0, 0.0))
        return (right + FIRST * PRIOR) / (tried + PRIOR)

    def _settle(self, request: Request) -> None:
        """See which of a request's guesses were right: they, or what came instead, stand in its text now."""
        known = self._open.pop(request, None)
        if known is None:
            return
        right = 0
        for index, (token, guess, grounds) in enumerate(zip(request.tokens[known.start :], *known.draft, strict=False)):
            self._learn(grounds, token == guess)  # of a guess that was not computed too
            self._learn(place(index), token == guess)
            if token != guess:
                break
            right += 1
        request.drafted_tokens += known.computed
        request.accepted_tokens += min(right, known.computed)

    def _learn(self, grounds: Any, hit: bool) -> None:
        right, tried = self._record.get(grounds, (0.0, 0.0))
        keep = 1.0 if tried < MEMORY else 1.0 - 1.0 / MEMORY
        self._record[grounds] = keep * right + hit, keep * tried + 1
