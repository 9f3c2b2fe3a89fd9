"""What a method of eviction decides, and what a request remembers until it is decided.

Two kinds of methods exist. One drops pages from the middle after every pass (`Eviction.excess`), and needs to see
nothing. The other chooses, at a prompt's end, the slots that every key head keeps (`Scored`): it folds how queries
attended, or the queries themselves, into what gives a score for each head and slot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...config import KVCacheConfig, guarded
from ...errors import CallbackFailed

FIRST = 4  # first tokens that every method keeps: heads that have nothing to look for attend to them


@dataclass
class Scores:
    """What was seen so far of how a prompt attends; requests with the same prompt share it.

    Attributes:
        layers: By layer, float32 on its device: what a method folds (`Scored.fold`).
        seen: Queries of tokens before this one are in.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    seen: int = 0


@dataclass
class Selection:
    """What a request is to lose at the end of its prompt.

    Attributes:
        prompt: Tokens of the prompt.
        held: How many of them lie in pages then: fewer where it goes on from pages that were evicted from before.
        kept: How many each head keeps.
        looks: Tokens whose queries are looked at.
        spare: Slots behind the prompt that are needed until it is decided.
        scores: What was seen.
    """

    prompt: int
    held: int
    kept: int
    looks: range
    spare: int = 0
    scores: Scores = field(default_factory=Scores)

    @property
    def findable(self) -> int:
        """Leading tokens whose queries nobody looks at."""
        return self.looks.start if self.looks else self.prompt

    def join(self, other: Selection) -> None:
        """Go on from what another request with the same prompt has seen."""
        self.scores = other.scores

    def restart(self) -> None:
        """Forget what was seen: the prompt is computed again."""
        self.scores = Scores()


class Eviction:
    """A method. The base keeps everything.

    Args:
        config: How much is kept.
    """

    replayed = 0  # tokens of the prompt that are computed a second time together, to see how they attend to it

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config
        self.chunk: int | None = None  # most tokens of a span

    def room(self, prompt: int, total: int, span: int) -> int:
        """Most tokens a request has in pages at one time.

        Args:
            prompt: Tokens of the prompt.
            total: Tokens of prompt and continuation.
            span: Most tokens of a pass.
        """
        return total

    def excess(self, slots: int) -> tuple[int, int]:
        """Which pages a request with so many slots in use gives back after a pass: the first, and how many."""
        return 0, 0

    def selection(self, prompt: int, held: int) -> Selection | None:
        """What a prompt of which `held` tokens lie in pages will lose, `None` for nothing."""
        return None


class Scored(Eviction, ABC):
    """A method that keeps the slots with the highest scores at the end of a prompt, each head its own."""

    recent = 0  # last tokens of the prompt that are kept whatever their score
    weighs = True  # whether it folds what queries pay to slots, or else the queries themselves

    def room(self, prompt: int, total: int, span: int) -> int:
        """All of the prompt until it ends."""
        kept = self._kept(prompt)
        if kept >= prompt:
            return total
        return max(prompt + min(self.replayed, prompt), kept + total - prompt) + 1

    def kept(self, prompt: int) -> int:
        """How many tokens of a prompt each head keeps."""
        if self.config.keep_tokens is not None:
            return min(prompt, self.config.keep_tokens)
        ratio = 0.5 if self.config.keep_ratio is None else self.config.keep_ratio
        return min(prompt, max(self.recent + FIRST, round(ratio * prompt)))

    def _kept(self, prompt: int) -> int:
        kept = called(self, "kept", prompt)
        if not isinstance(kept, int) or kept < 1:
            raise CallbackFailed(
                f"eviction {self.config.eviction!r}: kept({prompt}) returned {kept!r}; it is how many tokens each key "
                "head keeps, 1 at least."
            )
        return kept

    def selection(self, prompt: int, held: int) -> Selection | None:
        """As many as are above `kept`."""
        kept = self._kept(prompt)
        if kept >= held:
            return None
        looks = called(self, "looks", prompt)
        within = isinstance(looks, range) and looks.step == 1 and looks.start >= 0 and looks.stop <= prompt
        if not within or not (looks or self.replayed):
            raise CallbackFailed(
                f"eviction {self.config.eviction!r}: looks({prompt}) returned {looks!r}; it is a range of the prompt's "
                f"tokens, one at least: range({prompt - 1}, {prompt}), say, for the last one."
            )
        return Selection(prompt, held, kept, looks, min(prompt, self.replayed))

    @abstractmethod
    def looks(self, prompt: int) -> range:
        """The tokens of a prompt whose queries are looked at."""

    @abstractmethod
    def fold(self, scores: Tensor, seen: Tensor) -> None:
        """Take note of some queries, in place.

        Args:
            scores: float32 `[kv_heads, slots]`, 0 before the first call; if the method does not weigh,
                `[heads, key_dim + 1, key_dim + 1]`.
            seen: float32 `[kv_heads, heads per key head, queries, slots]`, what each query pays, 1 at most in sum; or
                the queries times the attention's scaling, `[heads, queries, key_dim]`.
        """

    def score(self, seen: Tensor, read: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """Scores `[kv_heads, slots]`.

        Args:
            seen: What was folded.
            read: Gives the keys `[slots, kv_heads, key_dim]` and values.
        """
        return seen

    def ranked(self, scores: Tensor, kept: int) -> Tensor:
        """Scores in the order of which slots are kept, `[kv_heads, slots]`; the first and last ones rank above all."""
        scores = scores.clone()
        scores[:, :FIRST] = float("inf")
        if self.recent:
            scores[:, -self.recent :] = float("inf")
        return scores

    def choose(self, scores: Tensor, kept: int) -> Tensor:
        """The slots that each head keeps, in their order, `[kv_heads, kept]`."""
        found: Tensor = self.ranked(scores, kept).topk(kept, dim=1).indices.sort(dim=1).values
        return found


def called(method: Eviction, name: str, *args: Any) -> Any:
    """What a function of a method returns; where it raises, the error says whose it is.

    Raises:
        CallbackFailed: It raised something else than an `LLMOptError`.
    """
    return guarded("eviction", str(method.config.eviction), f"{name}()", getattr(method, name), *args)


def with_rest(chosen: Tensor, held: int, rest: int) -> Tensor:
    """Append `rest` slots from `held` on to what each head keeps."""
    behind = torch.arange(held, held + rest, device=chosen.device).expand(len(chosen), -1)
    return torch.cat([chosen, behind], dim=1)
