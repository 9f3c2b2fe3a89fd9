"""Drafts for the requests of an engine: who guesses, how many guesses are computed, and how often they were right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import Any, Protocol

from .drafter import PLACES, Draft, Drafter, Odds, Text, check, place
from .length import PassCosts, choose_drafts

LONGEST = 15  # drafts of a request in a step
EVEN = (0, 1, 3, 7, LONGEST)  # drafts of each request, where all have equally many
AHEAD = 8  # tokens over which the price of one more is taken: T(n) rises in steps
FIRST = 0.5  # chance of a draft about whose grounds nothing is known yet
PRIOR = 2.0  # how many drafts that first guess weighs as much as
PLAIN = 32  # of so many steps one computes no guess: what that takes has to be known
REST = 16  # most steps in which nobody guesses, once guesses do not pay; then somebody looks again
NOTHING = Draft([], [])
MEMORY = 200.0  # drafts that are remembered for each grounds


class Request(Text, Protocol):
    """What is drafted for; the engine's `Request`."""

    drafted: int  # guesses that stand behind its text now
    chosen: dict[int, int]  # by guess, -1 for before them, the token that was chosen behind it
    drafted_tokens: int
    accepted_tokens: int

    def draft(self, tokens: Sequence[int], parents: list[int] | None) -> None:
        """Take these guesses; `parents` as in `Draft`."""
        ...


@dataclass
class _Open:
    """Guesses whose outcome is not known yet, which of them were computed, and where the first stands in the text."""

    draft: Draft
    computed: list[int]
    start: int


class Speculator:
    """Drafts the tokens of requests.

    Args:
        drafter: Who guesses.
        vocabulary: Ids that the model can read are smaller.
        measure: Returns the seconds of one pass over so many tokens.
        num_tokens: Drafts of a request in each step; `None` for as many as pay.
        branches: Whether a pass can compute several drafts behind one token.
        even: All requests of a step compute equally many drafts, of a few numbers only: a pass that is the same for all
            can be replayed from a graph. What is missing is filled up with guesses that nobody made.
    """

    def __init__(
        self,
        drafter: Drafter,
        vocabulary: int,
        measure: Callable[[int], float],
        num_tokens: int | None,
        branches: bool = False,
        even: bool = False,
    ) -> None:
        self.drafter = drafter
        self.num_tokens = num_tokens
        self.branches = branches
        self.even = even
        self.seconds = 0.0  # that the drafter has taken
        self._vocabulary = vocabulary
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

        Raises:
            CallbackFailed: What the drafter proposed cannot be computed.
        """
        began = perf_counter()
        if self._costs is not None and any(request in self._open for request in requests):  # whom the last step served
            self._costs.observe(self._tokens, began - self._began)
        for request in requests:
            self._settle(request)
        most = LONGEST if self.num_tokens is None else self.num_tokens
        room, limits = limits, [min(most, limit) for limit in limits]
        rows = len(requests)
        if self.num_tokens is None:
            costs = self._costs = self._costs or PassCosts(self._measure)
            self._steps += 1
            if self._resting or self._steps % PLAIN == 0:
                self._resting = max(0, self._resting - 1)
                limits = [0] * rows
            more, each = (costs(rows + AHEAD) - costs(rows)) / AHEAD, costs(rows) / rows  # of a draft, and of a token
            odds = Odds(self._chance, lambda seconds: (seconds + more) / each, self.branches)
            drafts = self._proposed(requests, limits, odds)
            computed = choose_drafts([self._chances(draft) for draft in drafts], costs)
            if any(computed):
                self._rest = 0
            elif any(draft.tokens for draft in drafts):
                self._resting = self._rest = min(REST, 2 * self._rest + 1)
        else:
            odds = Odds(self._chance, lambda seconds: 0.0)
            drafts = self._proposed(requests, limits, odds)
            computed = [list(range(len(draft.tokens))) for draft in drafts]
        longest = next((size for size in EVEN if size >= max(map(len, computed))), 0) if self.even else 0
        for request, draft, chosen, limit in zip(requests, drafts, computed, room, strict=True):
            self._open[request] = _Open(draft, chosen, len(request.tokens))
            part = _part(draft, chosen)
            filling = [0] * (min(longest, limit) - len(chosen))
            request.draft(part.tokens + filling, part.parents)
        now = perf_counter()
        self.seconds += now - began
        self._tokens, self._began = sum(1 + request.drafted for request in requests), now

    def _proposed(self, requests: Sequence[Request], limits: Sequence[int], odds: Odds) -> list[Draft]:
        drafts = self.drafter.propose(requests, limits, odds)
        check(drafts, limits, self._vocabulary, self.branches)
        return drafts

    def _chances(self, draft: Draft) -> list[float]:
        """The chance of each guess to count: that it is right, and all it stands behind are."""
        chances: list[float] = []
        for index, grounds in enumerate(draft.grounds):
            parent = draft.parent(index)
            chances.append(self._chance(grounds) * (1.0 if parent < 0 else chances[parent]))
        return chances

    def forget(self, request: Request) -> None:
        """A request has ended; harmless if nothing was drafted for it."""
        self._settle(request)
        self.drafter.forget(request)

    def right_by_place(self) -> list[float]:
        """How often guesses at each place of a draft were right lately, where all before them were; none unknown."""
        found = [self._record.get(place(index)) for index in range(PLACES)]
        return [record[0] / record[1] for record in takewhile(bool, found) if record is not None]

    def _chance(self, grounds: Any) -> float:
        right, tried = self._record.get(grounds, (0.0, 0.0))
        return (right + FIRST * PRIOR) / (tried + PRIOR)

    def _settle(self, request: Request) -> None:
        """See which of a request's guesses were right: they, or what came instead, stand in its text now."""
        known = self._open.pop(request, None)
        if known is None:
            return
        part = _part(known.draft, known.computed)
        chosen = {index: token for index, token in request.chosen.items() if index < len(part.tokens)}
        self.drafter.learn(request, known.start, part, chosen)
        if not known.draft.tokens:
            return
        draft, behind = known.draft, defaultdict[int, list[int]](list)
        for index in range(len(draft.tokens)):
            behind[draft.parent(index)].append(index)
        node, right = -1, 0
        for depth, token in enumerate(request.tokens[known.start :]):
            guesses, hit = behind[node], None
            for index in guesses:  # of a guess that was not computed too
                self._learn(draft.grounds[index], draft.tokens[index] == token)
                hit = index if draft.tokens[index] == token else hit
            if guesses:
                self._learn(place(depth), hit is not None)
            if hit is None:
                break
            node, right = hit, right + (hit in known.computed)
        request.drafted_tokens += len(known.computed)
        request.accepted_tokens += right

    def _learn(self, grounds: Any, hit: bool) -> None:
        right, tried = self._record.get(grounds, (0.0, 0.0))
        keep = 1.0 if tried < MEMORY else 1.0 - 1.0 / MEMORY
        self._record[grounds] = keep * right + hit, keep * tried + 1


def _part(draft: Draft, chosen: Sequence[int]) -> Draft:
    """The guesses that were chosen; nobody who stands behind another is chosen without it."""
    if not chosen:
        return NOTHING
    tokens, grounds = [draft.tokens[index] for index in chosen], [draft.grounds[index] for index in chosen]
    places = {index: place for place, index in enumerate(chosen)}
    parents = [places.get(draft.parent(index), -1) for index in chosen]
    return Draft(tokens, grounds, None if parents == list(range(-1, len(parents) - 1)) else parents)
