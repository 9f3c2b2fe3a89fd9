"""Logits processors of many rows at once, each row with its own settings.

transformers' processors work on the rows of one call, which share their settings. Here the rows are different
requests. Each stage does to a row what the processor of the same row would do, in the same order of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import TokenOutOfRange
from ..kv_cache import upload

REMOVED = -float("inf")
BITS = 32  # of a word of a constraint's mask


class History(Protocol):
    """What penalties look at."""

    tokens: list[int]

    def ids(self) -> Tensor:
        """Prompt and continuation `[1, length]`."""
        ...


class Constraint(Protocol):
    """What a sequence may consist of, a grammar say. It belongs to one sequence and may keep what it knows of it."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Which tokens may come next.

        Args:
            tokens: All new tokens of the sequence so far. Each call may have more of them than the last, never others.

        Returns:
            int32 `[words]` on the CPU; bit `t % 32` of word `t // 32` stands for token `t`. Tokens beyond are not
            allowed.
        """
        ...


@dataclass(frozen=True)
class Shaped:
    """A stage and its setting for one row.

    Attributes:
        order: Place among the stages: those of a row come in rising order.
        run: Changes scores `[rows, vocabulary]` of the rows that have the stage, given their settings.
        setting: The row's.
    """

    order: int
    run: Callable[[Tensor, Sequence[Any], Sequence[History]], Tensor]
    setting: Any

    @property
    def looks_back(self) -> bool:
        """Whether it depends on the tokens so far."""
        return self.run in (_repetition, _counts, _allowed)

    @property
    def outdates(self) -> bool:
        """Whether it says nothing about tokens behind the next one, which a penalty does roughly."""
        return self.run is _allowed


def apply(rows: Sequence[tuple[Sequence[Shaped], History]], scores: Tensor) -> Tensor:
    """Run every row's stages: each stage once, over the rows that have it.

    Args:
        rows: Stages of each row, and what penalties look at.
        scores: float32 `[rows, vocabulary]`; unchanged.
    """
    by_order: dict[int, list[tuple[int, Shaped]]] = {}
    for index, (stages, _) in enumerate(rows):
        for stage in stages:
            by_order.setdefault(stage.order, []).append((index, stage))
    if by_order:
        scores = scores.clone()
    for order in sorted(by_order):
        places = [index for index, _ in by_order[order]]
        stages = [stage for _, stage in by_order[order]]
        settings, histories = [stage.setting for stage in stages], [rows[index][1] for index in places]
        if len(places) == len(rows):
            scores = stages[0].run(scores, settings, histories)
        else:
            scores[places] = stages[0].run(scores[places], settings, histories)
    return scores


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _flat(places: Sequence[Tensor], scores: Tensor) -> Tensor:
    """Places in each row's vocabulary as places in all of `scores`."""
    size = scores.shape[1]
    return torch.cat([row * size + ids.to(scores.device) for row, ids in enumerate(places)])


def _bias(scores: Tensor, settings: Sequence[dict[int, float]], histories: Sequence[History]) -> Tensor:
    for biases in settings:
        if not all(0 <= token < scores.shape[1] for token in biases):
            last = scores.shape[1] - 1
            raise TokenOutOfRange(f"A bias names tokens {sorted(biases)}; the model's ids are 0 to {last}.")
    index = _flat([torch.tensor(list(biases), dtype=torch.long) for biases in settings], scores)
    given = [value for biases in settings for value in biases.values()]
    values = torch.tensor(given, dtype=scores.dtype, device=scores.device)  # they may all be ints
    return scores.view(-1).index_add(0, index, values).view_as(scores)


def _repetition(scores: Tensor, settings: Sequence[float], histories: Sequence[History]) -> Tensor:
    # A model may embed more ids than it scores.
    ids = [row[row < scores.shape[1]] for row in (history.ids()[0] for history in histories)]
    flat, index = scores.reshape(-1), _flat(ids, scores)
    penalty = torch.tensor(settings, device=scores.device).repeat_interleave(
        torch.tensor([len(row) for row in ids], device=scores.device)
    )
    seen = flat[index]
    return flat.index_put((index,), torch.where(seen < 0, seen * penalty, seen / penalty)).view_as(scores)


def _counts(scores: Tensor, settings: Sequence[tuple[float, float]], histories: Sequence[History]) -> Tensor:
    index = _flat([torch.tensor(history.tokens, dtype=torch.long) for history in histories], scores)
    counts = torch.zeros_like(scores).view(-1).index_add_(0, index, torch.ones_like(index, dtype=scores.dtype))
    counts = counts.view_as(scores)
    frequency, presence = (_column(values, scores) for values in zip(*settings, strict=True))
    return scores - counts * frequency - (counts > 0) * presence


def _allowed(scores: Tensor, settings: Sequence[Constraint], histories: Sequence[History]) -> Tensor:
    words = -(-scores.shape[1] // BITS)
    masks = torch.zeros(len(scores), words, dtype=torch.int32, device="cpu")
    for mask, constraint, history in zip(masks, settings, histories, strict=True):
        found = constraint.allowed(history.tokens)[:words]
        mask[: len(found)] = found
    octets = upload(masks, scores.device).view(torch.uint8)  # the lowest bits first
    # Rows of a table are looked up and added at a tenth of what it costs to take bits apart and to fill by a mask.
    bars = embedding(octets.int(), _bars(scores.device)).flatten(1)  # [rows, vocabulary or a little more]
    return scores + bars[:, : scores.shape[1]]


@lru_cache
def _bars(device: torch.device) -> Tensor:
    """What the bits of an octet add to the scores of its tokens: float32 `[256, 8]`, the lowest bit first."""
    bits = (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1
    return torch.zeros(256, 8, device="cpu").masked_fill_(bits == 0, REMOVED).to(device)


def _temperature(scores: Tensor, settings: Sequence[float], histories: Sequence[History]) -> Tensor:
    return scores / _column(settings, scores)


def _top_k(scores: Tensor, settings: Sequence[int], histories: Sequence[History]) -> Tensor:
    wanted = [min(k, scores.shape[1]) for k in settings]
    best = scores.topk(max(wanted), dim=-1).values
    least = best.gather(-1, torch.tensor(wanted, device=scores.device)[:, None] - 1)
    return scores.masked_fill(scores < least, REMOVED)


def _top_p(scores: Tensor, settings: Sequence[float], histories: Sequence[History]) -> Tensor:
    # What earlier stages removed has no probability: after a top-k only the few that are left need sorting. Rows are
    # sorted together with those of the same width only, so that a row's rounding does not depend on the others.
    widths: dict[int, list[int]] = {}
    for row, left in enumerate((scores > REMOVED).sum(-1).tolist()):
        width = 1 << max(0, left - 1).bit_length()
        widths.setdefault(width if width <= scores.shape[1] // 8 else scores.shape[1], []).append(row)
    removed = torch.zeros_like(scores, dtype=torch.bool)
    for width, rows in widths.items():
        part = scores if len(rows) == len(scores) else scores[rows]
        if width < scores.shape[1]:
            found = part.topk(width, dim=-1)
            ordered, places = found.values.flip(-1), found.indices.flip(-1)
        else:
            ordered, places = part.sort(dim=-1)
        unlikely = ordered.softmax(-1).cumsum(-1) <= _column([1 - settings[row] for row in rows], scores)
        unlikely[:, -1] = False
        removed[rows] = removed[rows].scatter_(1, places, unlikely)
    return scores.masked_fill(removed, REMOVED)


def _min_p(scores: Tensor, settings: Sequence[float], histories: Sequence[History]) -> Tensor:
    probabilities = scores.softmax(-1)
    least = probabilities.amax(-1, keepdim=True) * _column(settings, scores)
    return scores.masked_fill(probabilities < least, REMOVED)


def _usual(warper: Any) -> bool:
    return bool(warper.filter_value == REMOVED and warper.min_tokens_to_keep == 1)


def _bias_setting(processor: Any) -> dict[int, float] | None:
    biases: dict[tuple[int, ...], float] = processor.sequence_bias
    single = all(len(sequence) == 1 for sequence in biases)
    return {sequence[0]: value for sequence, value in biases.items()} if single else None


def _stage(
    order: int,
    run: Callable[[Tensor, Sequence[Any], Sequence[History]], Tensor],
    setting: Callable[[Any], Any],
) -> Callable[[Any], Shaped | None]:
    def make(processor: Any) -> Shaped | None:
        found = setting(processor)
        return None if found is None else Shaped(order, run, found)

    return make


# By the very type: a subclass may do anything. A setting of `None` means that the processor has to be called.
STAGES: dict[type, Callable[[Any], Shaped | None]] = {
    SequenceBiasLogitsProcessor: _stage(0, _bias, _bias_setting),
    RepetitionPenaltyLogitsProcessor: _stage(
        1, _repetition, lambda p: p.penalty if p.prompt_ignore_length is None else None
    ),
    TemperatureLogitsWarper: _stage(5, _temperature, lambda p: p.temperature),
    TopKLogitsWarper: _stage(6, _top_k, lambda p: p.top_k if _usual(p) else None),
    TopPLogitsWarper: _stage(7, _top_p, lambda p: p.top_p if _usual(p) else None),
    MinPLogitsWarper: _stage(8, _min_p, lambda p: p.min_p if _usual(p) else None),
}


def logit_bias(biases: dict[int, float]) -> Shaped:
    """The stage that adds to the scores of single tokens."""
    return Shaped(2, _bias, biases)


def count_penalty(frequency: float, presence: float) -> Shaped:
    """The stage that lowers the scores of tokens generated before, as OpenAI's API defines it.

    Args:
        frequency: Subtracted once for each time.
        presence: Subtracted once.
    """
    return Shaped(3, _counts, (frequency, presence))


def constrain(constraint: Constraint) -> Shaped:
    """The stage that removes all tokens which a constraint does not allow.

    It comes behind what changes scores and before what chooses among the likeliest, so that those are likely ones of
    the allowed.
    """
    return Shaped(4, _allowed, constraint)
