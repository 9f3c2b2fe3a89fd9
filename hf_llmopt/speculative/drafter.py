"""What a drafter is: whoever guesses the next tokens of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

PLACES = 8  # of a draft that are told apart


class Draft(NamedTuple):
    """Guessed tokens of one request.

    Attributes:
        tokens: The guesses; none is a guess too.
        grounds: For each token what it was guessed from, anything hashable: tokens with the same grounds are about
            equally often right, and `Speculator` learns how often that is.
        parents: For each token the place in `tokens` of the one it stands behind, which comes before it; -1 for a token
            that stands behind the text. `None` if each stands behind the one before.
    """

    tokens: list[int]
    grounds: list[Any]
    parents: list[int] | None = None

    def parent(self, index: int) -> int:
        """What a token stands behind."""
        return index - 1 if self.parents is None else self.parents[index]


class Text(Protocol):
    """What a drafter sees of a request."""

    tokens: list[int]  # prompt and continuation
    positions: list[int]
    next_position: int
    left_padding: int
    salt: str | None  # with whom it may share what was computed, or guessed
    adapter: str | None  # the LoRA adapter that it goes through
    prefix: Any  # not `None` if what is computed of it may be found by others
    # The tokens that the request would choose with these logits `[vocabulary]`, so many tokens behind its next one: the
    # first, then what it would choose if that were not allowed, as many as are asked for; each with its probability.
    # Fewer where no more are allowed; none if the logits have NaN.
    guess: Callable[[Tensor, int, int], list[tuple[int, float]]]


class Odds(NamedTuple):
    """What is known about guesses and their price.

    Attributes:
        chance: How often guesses with these grounds were right.
        worth: The chance from which on a guess pays that takes so many seconds to find.
        branches: Whether several guesses may stand behind one.
    """

    chance: Callable[[Any], float]
    worth: Callable[[float], float]
    branches: bool = False


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

    def learn(self, text: Text, start: int, draft: Draft, chosen: Mapping[int, int]) -> None:
        """See what the model chose.

        Args:
            text: Whose guesses were computed.
            start: Tokens of the text that were known then.
            draft: What was computed.
            chosen: For places in `draft`, -1 for before it, the token that the model chose there.
        """
        ...

    def forget(self, text: Text) -> None:
        """A request has ended; harmless if nothing was guessed for it."""
        ...


def place(index: int) -> tuple[str, int]:
    """The grounds that all guesses at one place of a draft have in common; those far behind are taken together."""
    return "place", min(index, PLACES - 1)
