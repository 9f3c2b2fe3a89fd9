"""Which of several ways to compute the same thing is faster here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch


@torch.no_grad()
def best_seconds(ways: Sequence[Callable[[], object]], rounds: int = 5) -> list[float]:
    """What each way takes, in turns, the best of several rounds.

    Example:
        >>> first, second = best_seconds([lambda: sum(range(10)), lambda: sum(range(100_000))])
        >>> first < second
        True
    """
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for index, way in enumerate(ways):
            began = perf_counter()
            way()
            best[index] = min(best[index], perf_counter() - began)
    return best
