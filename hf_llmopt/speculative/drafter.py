"""What a drafter is: whoever guesses the next tokens of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..attention.tree import MOST_NODES
from ..errors import CallbackFailed

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


def check(drafts: Sequence[Draft], limits: Sequence[int], vocabulary: int, branches: bool) -> None:
    """See that drafts can be computed.

    Args:
        drafts: What a drafter proposed, one for each of its texts.
        limits: The most tokens behind one another, for each.
        vocabulary: Ids are smaller.
        branches: Whether several guesses may stand behind one.

    Raises:
        CallbackFailed: They cannot; the message says why.
    """
    if not isinstance(drafts, list) or len(drafts) != len(limits):
        got = f"{len(drafts)} drafts" if isinstance(drafts, list) else type(drafts).__name__
        raise CallbackFailed(f"propose() returns a list with a draft for each of {len(limits)} text(s), got {got}.")
    for draft, limit in zip(drafts, limits, strict=True):
        if not isinstance(draft, Draft) or not isinstance(draft.tokens, list):
            got = type(draft.tokens if isinstance(draft, Draft) else draft).__name__
            raise CallbackFailed(f"propose() gives Draft(tokens, grounds) with a list of ids as tokens, got {got}.")
        count = len(draft.tokens)
        for token in draft.tokens:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise CallbackFailed(f"propose() guessed {token!r}; the model's ids are 0 to {vocabulary - 1}, ints.")
        if len(draft.grounds) != count:
            raise CallbackFailed(f"propose() gave {len(draft.grounds)} grounds for {count} tokens; each has its own.")
        depths: list[int] = []  # how many stand behind one another up to each token
        parents = range(-1, count - 1) if draft.parents is None else draft.parents
        for index, parent in enumerate(parents):
            if not (-1 <= parent < index if branches else parent == index - 1):
                raise CallbackFailed(
                    f"propose() gave the parents {draft.parents}: each is the place of an earlier token, or -1"
                    + ("." if branches else "; nothing may branch here.")
                )
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        if len(depths) != count:
            raise CallbackFailed(f"propose() gave {len(depths)} parents for {count} tokens; each has its own.")
        if max(depths, default=0) > limit or count > max(limit, MOST_NODES):
            raise CallbackFailed(f"propose() guessed {count} tokens where the limit is {limit}.")


def place(index: int) -> tuple[str, int]:
    """The grounds that all guesses at one place of a draft have in common; those far behind are taken together."""
    return "place", min(index, PLACES - 1)
