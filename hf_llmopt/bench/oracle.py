"""A drafter that knows what will come, and says so a given share of the time: what guesses of a known chance give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from hf_llmopt.speculative import Draft
from hf_llmopt.speculative.drafter import Odds, Text


class Oracle:
    """Guesses that are right with a given chance, whatever the text.

    Args:
        ends: What plain decoding made of each text, prompts included.
        right: The chance of a guess to be right.
        vocabulary: Tokens that there are.
        width: Guesses behind each token, one of which may be right.
        seed: Of the choice.
    """

    def __init__(
        self, ends: Sequence[Sequence[int]], right: float, vocabulary: int, width: int = 1, seed: int = 0
    ) -> None:
        self._ends = [list(end) for end in ends]
        self._right, self._vocabulary, self._width = right, vocabulary, width
        self._random = Random(seed)

    def propose(self, texts: Sequence[Text], limits: Sequence[int], odds: Odds) -> list[Draft]:
        """Guess, for each text up to `limit` tokens."""
        return [self._propose(text.tokens, limit) for text, limit in zip(texts, limits, strict=True)]

    def _propose(self, known: list[int], limit: int) -> Draft:
        end = next((end for end in self._ends if end[: len(known)] == known), [])
        draft, node = Draft([], [], parents := []), -1
        for token in end[len(known) : len(known) + limit]:
            guesses = [(token + 1 + index) % self._vocabulary for index in range(self._width)]
            place = self._random.randrange(self._width)
            if self._random.random() < self._right:
                guesses[place] = token
            guesses = guesses[: limit - len(draft.tokens)]
            first = len(draft.tokens)
            draft.tokens.extend(guesses)
            draft.grounds.extend(("oracle", self._right, index == place) for index in range(len(guesses)))
            parents.extend([node] * len(guesses))
            node = first + min(place, len(guesses) - 1)
            if len(draft.tokens) >= limit:
                break
        return draft

    def learn(self, text: Text, start: int, draft: Draft, chosen: Mapping[int, int]) -> None:
        """It knows."""

    def forget(self, text: Text) -> None:
        """It knows."""
