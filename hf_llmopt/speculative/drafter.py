"""What a drafter is: whoever guesses the next tokens of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Draft(NamedTuple):
    """Guessed tokens of one request, in order.

    Attributes:
        tokens: The guesses; none is a guess too.
        grounds: For each token what it was guessed from, anything hashable: tokens with the same grounds are about
            equally often right, and `Speculator` learns how often that is.
    """

    tokens: list[int]
    grounds: list[Any]


class Text(Protocol):
    """What a drafter sees of a request. It may be a key of a `WeakKeyDictionary`."""

    tokens: list[int]  # prompt and continuation


class Drafter(Protocol):
    """Guesses the tokens that follow."""

    def propose(self, texts: Sequence[Text], limits: Sequence[int]) -> list[Draft]:
        """Guess.

        Args:
            texts: Requests; their tokens are those of the last call with some more behind them.
            limits: The most tokens that can be used, for each.
        """
        ...
