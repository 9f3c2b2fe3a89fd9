"""What a drafter is: whoever guesses the next tokens of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


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
    """What a drafter sees of a request."""

    tokens: list[int]  # prompt and continuation
    positions: list[int]
    next_position: int
    left_padding: int
    # The token that the request would choose with these logits `[vocabulary]`, so many tokens behind its next one, and
    # how likely its choice is; -1 if there is none, because the logits have NaN.
    guess: Callable[[Tensor, int], tuple[int, float]]


class Odds(NamedTuple):
    """What is known about guesses and their price.

    Attributes:
        chance: How often guesses with these grounds were right.
        worth: The chance from which on a guess pays that takes so many seconds to find.
    """

    chance: Callable[[Any], float]
    worth: Callable[[float], float]


class Drafter(Protocol):
    """Guesses the tokens that follow."""

    def propose(self, texts: Sequence[Text], limits: Sequence[int], odds: Odds) -> list[Draft]:
        """Guess.

        Args:
            texts: Requests; their tokens are those of the last call with some more behind them.
            limits: The most tokens that can be used, for each.
            odds: May be asked.
        """
        ...

    def forget(self, text: Text) -> None:
        """A request has ended; harmless if nothing was guessed for it."""
        ...


def place(index: int) -> tuple[str, int]:
    """The grounds that all guesses at one place of a draft have in common; those far behind are taken together."""
    return "place", min(index, 3)
