"""Guesses from the text itself: what followed when its last tokens stood there before.

Prompt lookup (Saxena 2023) takes the first place where the last n tokens occurred. Here, as in SuffixDecoding (Oliaro
et al. 2024, arXiv 2411.04975) and SAM-Decoding (Hu et al. 2024, arXiv 2411.10666), the longest match decides, and
among several places what followed most often; the guess goes on through its own tokens, so that loops are followed.
"""

from __future__ import annotations

from collections.abc import Sequence

from .drafter import Draft, Odds, Text

ORDERS = (12, 6, 3, 2, 1)  # tokens of a match that are looked up, the longest first
PLACES = 8  # the most recent ones of a match


class _Index:
    """Where the runs of the lengths `ORDERS` end in a text."""

    def __init__(self) -> None:
        self.length = 0
        self._ends: dict[int, list[int]] = {}  # by a hash: two runs that share one make a poor guess, nothing worse

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new, but for the last: nothing follows it yet."""
        for end in range(self.length + 1, len(tokens)):
            for order in ORDERS:
                if order <= end:
                    ends = self._ends.setdefault(hash(tuple(tokens[end - order : end])), [])
                    ends.append(end)
                    if len(ends) > PLACES:
                        del ends[0]
        self.length = max(self.length, len(tokens) - 1)

    def find(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """The longest of the last runs that occurred before, and where what followed begins, oldest first."""
        for order in ORDERS:
            if order <= len(tokens) and (ends := self._ends.get(hash(tuple(tokens[-order:])))):
                return order, ends
        return 0, []


class SuffixDrafter:
    """Guesses what followed the longest match of a text's end in its prompt and continuation.

    Example:
        >>> from types import SimpleNamespace
        >>> class Text(SimpleNamespace):
        ...     __hash__ = object.__hash__
        >>> SuffixDrafter().propose([Text(tokens=[7, 1, 2, 3, 7, 1])], [3])[0].tokens
        [2, 3, 7]
    """

    def __init__(self) -> None:
        self._indices: dict[Text, _Index] = {}

    def propose(self, texts: Sequence[Text], limits: Sequence[int], odds: Odds | None = None) -> list[Draft]:
        """Guess, for each text up to `limit` tokens."""
        return [self._propose(text, limit) for text, limit in zip(texts, limits, strict=True)]

    def forget(self, text: Text) -> None:
        """The text has ended."""
        self._indices.pop(text, None)

    def _propose(self, text: Text, limit: int) -> Draft:
        if limit == 0:
            return Draft([], [])
        index = self._indices.setdefault(text, _Index())
        index.extend(text.tokens)
        order, places = index.find(text.tokens)
        draft = Draft([], [])
        start = len(text.tokens)

        def token_at(place: int) -> int:
            return text.tokens[place] if place < start else draft.tokens[place - start]

        while places and len(draft.tokens) < limit:
            votes: dict[int, int] = {}
            for place in places:
                votes[token_at(place)] = votes.get(token_at(place), 0) + 1
            best = max(reversed(places), key=lambda place: votes[token_at(place)])  # of several, the most recent
            token = token_at(best)
            draft.grounds.append((order, min(len(draft.tokens), 3), votes[token], len(places) - votes[token]))
            places = [place + 1 for place in places if token_at(place) == token]
            draft.tokens.append(token)
        return draft
