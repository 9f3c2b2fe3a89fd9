"""How many drafts are worth their time.

A pass over n tokens takes T(n) seconds and gives a token for each request, and one more for each draft that is right
along with all before it. The drafts that are computed are those that give the most tokens per second: all drafts of a
step are sorted by the chance that they count, and taken one by one as long as the best ratio is not behind (algorithm 1
of DSpark, DeepSeek-AI 2026, does likewise).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

SIZES = (1, 2, 4, 8, 16, 32)  # tokens of the passes that are measured
FORGET = 0.1  # weight of a new observation


class PassCosts:
    """What a step over n tokens takes, T(n), in seconds.

    Measured once for a single request; then corrected by the steps that are taken, for each size by itself: contexts,
    several requests and the host's work make long steps dearer by another share than short ones.

    Args:
        measure: Returns the seconds of one pass over so many tokens; called once for each of `SIZES`.

    Example:
        >>> costs = PassCosts(lambda tokens: 1.0 + 0.1 * tokens)
        >>> round(costs(10), 3)
        2.0
        >>> costs.observe(8, 3.6)
        >>> round(costs(8), 3)
        3.6
    """

    def __init__(self, measure: Callable[[int], float]) -> None:
        self._seconds: list[float] = []
        for size in SIZES:  # more tokens never take less: what says otherwise is noise
            self._seconds.append(max([measure(size), *self._seconds[-1:]]))
        self._ratios: dict[int, float] = {}  # by place in `SIZES`: what steps took, as a share of that

    def __call__(self, tokens: int) -> float:
        """The seconds a step over so many tokens takes, from one size to the next in a straight line."""
        index = min(max(1, bisect_left(SIZES, tokens)), len(SIZES) - 1)
        low, high = SIZES[index - 1], SIZES[index]
        share = (tokens - low) / (high - low)
        return (1 - share) * self._at(index - 1) + share * self._at(index)

    def _at(self, index: int) -> float:
        """Of a size; of one that was not met, as far off as the nearest that was."""
        nearest = min(self._ratios, key=lambda met: abs(met - index), default=None)
        return self._seconds[index] * (1.0 if nearest is None else self._ratios[nearest])

    def observe(self, tokens: int, seconds: float) -> None:
        """A step over so many tokens took `seconds`."""
        index = min(range(len(SIZES)), key=lambda place: abs(SIZES[place] - tokens))
        ratio = seconds / (self._seconds[index] * max(1.0, tokens / SIZES[-1]))
        before = self._ratios.get(index, ratio)
        self._ratios[index] = before + FORGET * (ratio - before)


def choose_lengths(chances: Sequence[Sequence[float]], cost: Callable[[int], float]) -> list[int]:
    """How many drafts of each request to compute.

    Args:
        chances: For each request, the chance of each draft to count: that it is right and all before it are. Falling.
        cost: T(n).

    Returns:
        The lengths that maximise the expected tokens per second; 0 where drafts do not pay.

    Example:
        >>> choose_lengths([[0.9, 0.8, 0.1], [0.2]], lambda tokens: 1.0 + 0.1 * tokens)
        [2, 0]
    """
    rows = len(chances)
    ordered = sorted(((-chance, row) for row, own in enumerate(chances) for chance in own), key=lambda pair: pair[0])
    expected, best, taken = float(rows), rows / cost(rows), 0
    for count, (chance, _) in enumerate(ordered, 1):
        expected -= chance
        if expected / cost(rows + count) > best:
            best, taken = expected / cost(rows + count), count
    lengths = [0] * rows
    for _, row in ordered[:taken]:
        lengths[row] += 1
    return lengths
