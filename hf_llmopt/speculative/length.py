"""How many drafts are worth their time.

A pass over n tokens takes T(n) seconds and gives a token for each request, and one more for each draft that is right
along with all before it. The drafts that are computed are those that give the most tokens per second: all drafts of a
step are sorted by the chance that they count, and taken one by one as long as the best ratio is not behind (algorithm 1
of DSpark, DeepSeek-AI 2026, does likewise).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # tokens of the passes that are measured
FORGET = 0.1  # weight of a new observation
MOST = 2.0  # an observation counts as at most so many times what was expected: others may have used the machine


class PassCosts:
    """What a step over n tokens takes, T(n), in seconds.

    Measured once for a single request; then corrected by the steps that are taken, for each size by itself: contexts,
    several requests and the host's work make long steps dearer by another share than short ones.

    Args:
        measure: Returns the seconds of one pass over so many tokens; called once for each of `SIZES` that is needed.

    Example:
        >>> costs = PassCosts(lambda tokens: 1.0 + 0.1 * tokens)
        >>> round(costs(10), 3)
        2.0
        >>> costs.observe(8, 3.6)
        >>> round(costs(8), 3)
        3.6
    """

    def __init__(self, measure: Callable[[int], float]) -> None:
        self._measure = measure
        self._measured: dict[int, float] = {}  # by place in `SIZES`
        self._ratios: dict[int, float] = {}  # likewise: what steps took, as a share of that
        self._known: dict[int, float] = {}  # T(n), until the next observation

    def __call__(self, tokens: int) -> float:
        """The seconds a step over so many tokens takes, from one size to the next in a straight line."""
        if tokens not in self._known:
            index = min(max(1, bisect_left(SIZES, tokens)), len(SIZES) - 1)
            low, high = SIZES[index - 1], SIZES[index]
            share = (tokens - low) / (high - low)
            self._known[tokens] = (1 - share) * self._at(index - 1) + share * self._at(index)
        return self._known[tokens]

    def _at(self, index: int) -> float:
        """Of a size; of one that was not met, as far off as the nearest that was."""
        nearest = min(self._ratios, key=lambda met: abs(met - index), default=None)
        return self._alone(index) * (1.0 if nearest is None else self._ratios[nearest])

    def _alone(self, index: int) -> float:
        """What a pass of a size takes by itself."""
        if index not in self._measured:
            smaller = [seconds for other, seconds in self._measured.items() if other < index]
            # More tokens never take less: what says otherwise is noise.
            self._measured[index] = max([self._measure(SIZES[index]), *smaller])
        return self._measured[index]

    def observe(self, tokens: int, seconds: float) -> None:
        """A step over so many tokens took `seconds`."""
        index = min(range(len(SIZES)), key=lambda place: abs(SIZES[place] - tokens))
        alone = self._alone(index)
        expected = self._at(index) / alone
        ratio = min(MOST * expected, seconds / (alone * max(1.0, tokens / SIZES[-1])))
        weight = FORGET if index in self._ratios else 1.0
        self._ratios[index] = expected + weight * (ratio - expected)
        self._known.clear()


def choose_drafts(chances: Sequence[Sequence[float]], cost: Callable[[int], float]) -> list[list[int]]:
    """Which drafts of each request to compute.

    Args:
        chances: For each request, the chance of each draft to count: that it is right and all it stands behind are. No
            draft has a better one than what it stands behind, which comes before it.
        cost: T(n).

    Returns:
        For each request, the drafts that maximise the expected tokens per second, in rising order; none where drafts do
        not pay.

    Example:
        >>> choose_drafts([[0.9, 0.8, 0.1], [0.2]], lambda tokens: 1.0 + 0.1 * tokens)
        [[0, 1], []]
    """
    rows = len(chances)
    ordered = sorted((-chance, row, index) for row, own in enumerate(chances) for index, chance in enumerate(own))
    expected, best, taken = float(rows), rows / cost(rows), 0
    for count, (chance, _, _) in enumerate(ordered, 1):
        if (expected - chance * (len(ordered) - count + 1)) / cost(rows + count) <= best:
            break  # not even if all that are left were as good as this one, and free
        expected -= chance
        if expected / cost(rows + count) > best:
            best, taken = expected / cost(rows + count), count
    drafts: list[list[int]] = [[] for _ in chances]
    for _, row, index in sorted(ordered[:taken], key=lambda draft: draft[2]):
        drafts[row].append(index)
    return drafts
