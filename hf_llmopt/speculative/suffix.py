"""Guesses without a model: what followed when the last tokens stood somewhere before.

Prompt lookup (Saxena 2023) takes the first place where the last n tokens occurred. Here, as in SuffixDecoding (Oliaro
et al. 2024, arXiv 2411.04975) and SAM-Decoding (Hu et al. 2024, arXiv 2411.10666), the longest match decides, in the
text itself or in what the model chose before, for other texts too; and as in Token Recycling (Luo et al. 2024, arXiv
2408.08696) what it chose behind guesses that were wrong is remembered as well. The likeliest guess comes first, and the
next may stand behind it, beside it or before it: a tree grows where it is worth most (EAGLE-2, Li et al. 2024, arXiv
2406.16858, does likewise with a model's confidence).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush

from .drafter import Draft, Odds, Text

ORDERS = (8, 4, 2, 1)  # tokens of a match that are looked up, the longest first
RECENT = 8  # times that are remembered of what followed a run
WIDTH = 3  # guesses behind one token
KEPT = 1 << 18  # runs of what the model chose that are remembered, for all texts together
MARGIN = 0.5  # of the chance that pays: what comes behind it may be taken as well

EVEN = Odds(lambda grounds: 0.5, lambda seconds: 0.0)


class _Followers:
    """What followed runs of tokens, by a hash: two runs that share one make a poor guess, nothing worse."""

    def __init__(self) -> None:
        self._recent: dict[int, list[int]] = {}

    def add(self, runs: Iterable[tuple[int, int]], token: int, most: int | None = None) -> None:
        """A token followed these runs."""
        for _, run in runs:
            recent = self._recent.setdefault(run, [])
            recent.append(token)
            if len(recent) > RECENT:
                del recent[0]
        while most is not None and len(self._recent) > most:
            del self._recent[next(iter(self._recent))]

    def find(self, runs: Iterable[tuple[int, int]]) -> tuple[int, list[int]]:
        """The length of the longest run that is known, and what followed it, the latest last."""
        for order, run in runs:
            if recent := self._recent.get(run):
                return order, recent
        return 0, []


def _runs(tokens: Sequence[int], salt: str | None = None) -> list[tuple[int, int]]:
    """The runs that end these tokens, the longest first: their lengths and hashes."""
    return [(order, hash((salt, *tokens[-order:]))) for order in ORDERS if order <= len(tokens)]


class SuffixDrafter:
    """Guesses what followed the longest match of a text's end in the text, and in what the model chose before.

    Texts of one salt, `None` being one too, learn from one another; those of others never do.

    Example:
        >>> from types import SimpleNamespace
        >>> class Text(SimpleNamespace):
        ...     __hash__ = object.__hash__
        >>> SuffixDrafter().propose([Text(tokens=[7, 1, 2, 3, 7, 1], salt=None)], [3])[0].tokens
        [2, 3, 7]
    """

    def __init__(self) -> None:
        self._own: dict[Text, tuple[_Followers, int]] = {}  # and how many tokens of the text it has read
        self._chosen = _Followers()

    def propose(self, texts: Sequence[Text], limits: Sequence[int], odds: Odds = EVEN) -> list[Draft]:
        """Guess, for each text up to `limit` tokens."""
        return [
            self._propose(text, limit, odds) if limit else Draft([], [])
            for text, limit in zip(texts, limits, strict=True)
        ]

    def learn(self, text: Text, start: int, draft: Draft, chosen: Mapping[int, int]) -> None:
        """Remember what the model chose, behind wrong guesses too."""
        branches: list[list[int]] = []
        for index, token in enumerate(draft.tokens):
            parent = draft.parent(index)
            branches.append([*(branches[parent] if parent >= 0 else []), token])
        tail = text.tokens[max(0, start - ORDERS[0]) : start]
        for index, token in chosen.items():
            self._chosen.add(_runs([*tail, *(branches[index] if index >= 0 else [])], text.salt), token, KEPT)

    def forget(self, text: Text) -> None:
        """The text has ended."""
        self._own.pop(text, None)

    def _propose(self, text: Text, limit: int, odds: Odds) -> Draft:
        own, read = self._own.get(text, (_Followers(), 0))
        for end in range(max(1, read), len(text.tokens)):  # nothing follows the last token yet
            own.add(_runs(text.tokens[max(0, end - ORDERS[0]) : end]), text.tokens[end])
        self._own[text] = own, len(text.tokens)
        draft, tail = Draft([], [], parents := []), text.tokens[-ORDERS[0] :]
        # Each with minus its chance to count, a number that no other has, what it stands behind, the guesses up to it,
        # and its grounds.
        open_: list[tuple[float, int, int, list[int], object]] = []
        numbers = 0

        def open_behind(node: int, branch: list[int], chance: float) -> None:
            nonlocal numbers
            guesses = self._guesses(own, [*tail, *branch], text.salt)
            found = sorted(((-chance * odds.chance(grounds), token, grounds) for token, grounds in guesses), key=_first)
            for rank, token, grounds in found[: WIDTH if odds.branches else 1]:
                heappush(open_, (rank, numbers := numbers + 1, node, [*branch, token], grounds))

        open_behind(-1, [], 1.0)
        least = MARGIN * odds.worth(0.0)
        while open_ and len(draft.tokens) < limit and -open_[0][0] >= least:
            rank, _, node, branch, grounds = heappop(open_)
            draft.tokens.append(branch[-1])
            draft.grounds.append(grounds)
            parents.append(node)
            if len(branch) < limit:
                open_behind(len(draft.tokens) - 1, branch, -rank)
        return draft

    def _guesses(self, own: _Followers, tokens: Sequence[int], salt: str | None) -> list[tuple[int, object]]:
        """What may follow, each token once, and the grounds of each: whence, how long a match, how many agree."""
        guesses: dict[int, object] = {}
        sources = own.find(_runs(tokens)), self._chosen.find(_runs(tokens, salt))
        for source in sorted((0, 1), key=lambda index: -sources[index][0]):
            order, recent = sources[source]
            for token in dict.fromkeys(reversed(recent)):
                votes = recent.count(token)
                guesses.setdefault(token, (source, order, votes, len(recent) - votes))
        return list(guesses.items())


def _first(item: tuple[float, int, object]) -> float:
    return item[0]
