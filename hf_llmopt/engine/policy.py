"""In which order waiting requests start (no torch here).

A policy is a line: `push` puts a request in, `first` is the one that starts next, and nobody starts before it. That
alone keeps a large request from starving, because smaller ones cannot slip past it. `rank` orders the requests that
run: whoever needs pages takes them from those of the highest rank. A rank never changes, so two requests cannot take
each other's pages in turns, and the one of the lowest rank always goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Protocol

from ..config import BatchingConfig
from .request import Request

Rank = tuple[int, int]


class Policy(Protocol):
    """A line of requests that wait for pages."""

    preempts: bool  # whether a waiting request takes the place of running ones of higher rank

    def rank(self, request: Request) -> Rank:
        """Place of a request among those that run; the lowest keeps its pages longest."""
        ...

    def push(self, request: Request) -> None:
        """Put a request into the line."""
        ...

    def first(self) -> Request | None:
        """The request that starts next, or `None`; the line is unchanged."""
        ...

    def discard(self, request: Request) -> None:
        """Take a request out; harmless if it is not in."""
        ...

    def served(self, request: Request, tokens: int) -> None:
        """Tokens of a request were computed for the first time."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class FirstCome:
    """Who came first starts first."""

    preempts = False

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Request]] = []
        self._waiting: set[Request] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting)

    def rank(self, request: Request) -> Rank:
        """The arrival."""
        return request.arrival, 0

    def push(self, request: Request) -> None:
        """Put a request into the line."""
        self._waiting.add(request)
        heappush(self._heap, (self.rank(request), request))

    def first(self) -> Request | None:
        """The request of the lowest rank."""
        while self._heap and self._heap[0][1] not in self._waiting:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def discard(self, request: Request) -> None:
        """Take a request out; its place in the heap is dropped when it comes to the top."""
        self._waiting.discard(request)
        if not self._waiting:
            self._heap.clear()

    def served(self, request: Request, tokens: int) -> None:
        """Nothing depends on it."""


class Priority(FirstCome):
    """Higher priority first, but whoever waits long enough goes first all the same.

    A level of priority is worth `aging` later arrivals: a request is passed by at most so many others per level, and
    no stream of urgent requests can starve it.
    """

    preempts = True

    def __init__(self, aging: int) -> None:
        super().__init__()
        self._aging = aging

    def rank(self, request: Request) -> Rank:
        """The arrival, made earlier by the priority."""
        return request.arrival - self._aging * request.priority, request.arrival


class Fair:
    """The tenant that was served least goes first; within a tenant, who came first.

    Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, arXiv:2401.00588): a counter per
    tenant of the tokens computed for it. A tenant that comes back starts no lower than the least served of those who
    are there, so that nobody saves up a claim by staying away.
    """

    preempts = False

    def __init__(self) -> None:
        self._lines: dict[str, FirstCome] = {}
        self._counters: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, list(self._lines.values())))  # a copy: `Engine.submit` asks without the lock

    def __iter__(self) -> Iterator[Request]:
        return (request for line in self._lines.values() for request in line)

    def rank(self, request: Request) -> Rank:
        """The arrival: counters change, and a rank must not."""
        return request.arrival, 0

    def push(self, request: Request) -> None:
        """Put a request into its tenant's line."""
        if request.tenant not in self._lines:
            floor = self._floor()
            # Debts below the floor mean nothing any more; the others are remembered for when the tenant returns.
            self._counters = {
                tenant: count for tenant, count in self._counters.items() if count > floor or tenant in self._lines
            }
            self._counters[request.tenant] = max(floor, self._counters.get(request.tenant, 0))
            self._lines[request.tenant] = FirstCome()
        self._lines[request.tenant].push(request)

    def _floor(self) -> int:
        return min((self._counters[tenant] for tenant in self._lines), default=max(self._counters.values(), default=0))

    def first(self) -> Request | None:
        """The first request of the tenant with the lowest counter."""
        tenant = min(self._lines, key=lambda name: self._counters[name], default=None)
        return None if tenant is None else self._lines[tenant].first()

    def discard(self, request: Request) -> None:
        """Take a request out of its tenant's line."""
        line = self._lines.get(request.tenant)
        if line is not None:
            line.discard(request)
            if not line:
                del self._lines[request.tenant]

    def served(self, request: Request, tokens: int) -> None:
        """Charge the tenant."""
        self._counters[request.tenant] = self._counters.get(request.tenant, 0) + tokens


def policy_of(config: BatchingConfig) -> Policy:
    """The empty line of a config's policy."""
    if config.policy == "fair":
        return Fair()
    return Priority(config.aging) if config.policy == "priority" else FirstCome()
