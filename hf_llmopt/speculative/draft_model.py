"""Guesses of a smaller model (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023).

The published rule accepts a guess x ~ q with probability min(1, p(x) / q(x)), and draws what is rejected anew. Here the
guess is what the model's own choice would be if its scores were the smaller model's: the same processors, the same
noise. Where both find the same token the guess was right. The tokens are those of plain sampling, seed for seed, and a
model that drafts for itself is always right; how often different models agree so is at least
(1 - d) / (1 + d), d the total variation distance of p and q (Daliri et al. 2025, arXiv 2408.07978), and at
most 1 - d, which the published rule reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Protocol

from torch import Tensor

from .drafter import Draft, Odds, Text, place

FORGET = 0.1  # weight of a new measurement
AGAIN = 64  # steps after which one text gets a guess, though none was worth it
BINS = 10  # of the smaller model's own confidence


class Second(Protocol):
    """The smaller model, which follows texts in pages of its own; `engine/second.py`."""

    def follow(self, texts: Sequence[Text]) -> None:
        """Know the tokens of these texts, and nothing behind them."""
        ...

    def logits(self, texts: Sequence[Text]) -> list[Tensor | None]:
        """Behind all tokens of each text, `[vocabulary]`; `None` where nothing more will come."""
        ...

    def append(self, text: Text, token: int) -> None:
        """A guess follows."""
        ...

    def forget(self, text: Text) -> None:
        """The text has ended."""
        ...


class DraftModelDrafter:
    """Guesses with a smaller model.

    Args:
        second: The model.
    """

    def __init__(self, second: Second) -> None:
        self._second = second
        self._seconds = [0.0, 0.0]  # that the first guess of a step takes, and each behind it
        self._read: set[Text] = set()  # to read a text for the first time takes longer
        self._waited = 0  # steps since somebody was last guessed for

    def propose(self, texts: Sequence[Text], limits: Sequence[int], odds: Odds) -> list[Draft]:
        """Guess, for each text `limit` tokens ahead at most, as long as the next guess is worth a pass.

        Where several may stand behind one token, the second likeliest of each place is a guess too: it costs no pass of
        the smaller model.
        """
        parents: list[list[int]] = [[] for _ in texts]
        drafts = [Draft([], [], own) for own in parents]
        mains: list[list[int]] = [[] for _ in texts]  # places of the likeliest guesses, which the model goes on from
        chances = [1.0] * len(texts)
        going = [index for index, limit in enumerate(limits) if limit > 0]
        self._waited += 1
        while going:
            paying = [index for index in going if self._pays(len(mains[index]), chances[index], odds)]
            if not paying and self._waited >= AGAIN:
                paying = going[:1]  # times may have changed; the model has to read all of a text to guess for it
            if not paying:
                break
            going, self._waited = paying, 0
            began, first = perf_counter(), not mains[going[0]]
            guessed = [texts[index] for index in going]
            known = self._read.issuperset(guessed)
            if first:
                self._second.follow(guessed)
                self._read.update(guessed)
            found = self._second.logits(guessed)
            for index, logits in zip(list(going), found, strict=True):
                draft, text, depth = drafts[index], texts[index], len(mains[index])
                guesses = [] if logits is None else text.guess(logits, depth, 2 if odds.branches else 1)
                node = mains[index][-1] if depth else -1
                mains[index].append(len(draft.tokens))
                for rank, (token, confidence) in enumerate(guesses):
                    draft.tokens.append(token)
                    draft.grounds.append((rank, min(depth, 3), min(BINS - 1, int(BINS * confidence))))
                    parents[index].append(node)
                if not guesses or depth + 1 == limits[index]:
                    going.remove(index)
                else:
                    chances[index] *= odds.chance(draft.grounds[mains[index][-1]])
                    self._second.append(text, guesses[0][0])
            if known:
                each, before = (perf_counter() - began) / len(guessed), self._seconds[not first]
                # Counted as twice what was expected at most: others may have used the machine.
                self._seconds[not first] = before + FORGET * (min(each, 2 * before) - before) if before else each
        return drafts

    def _pays(self, index: int, survival: float, odds: Odds) -> bool:
        """Whether the next guess is worth its pass, by how often guesses at its place were right so far."""
        return survival * odds.chance(place(index)) > odds.worth(self._seconds[index > 0])

    def learn(self, text: Text, start: int, draft: Draft, chosen: Mapping[int, int]) -> None:
        """The model reads the text itself."""

    def forget(self, text: Text) -> None:
        """The text has ended."""
        self._read.discard(text)
        self._second.forget(text)
