"""What `bench all` measures: calls of `generate`, and requests that every cell of the matrix answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .requests import Job

FULL = "full"  # weights or pages in the model's own numbers
WEIGHTS = (FULL, "int8", "int4")
PAGES = (FULL, "int8")
PARTS = ("prompt cache", "speculation", "batching")


@dataclass(frozen=True)
class Case:
    """A call of `generate` that is made in every way; each round has prompts of its own.

    Attributes:
        name: Says it in a table.
        rows: Prompts of the call.
        prompt: Fewest and most tokens of a prompt.
        new_tokens: To generate for each row.
        sampled: Sample, the same seed in every way, instead of taking the likeliest token.
        again: All rounds have the same prompts, as in a chat or with a document; a first one is not timed.
    """

    name: str
    rows: int
    prompt: tuple[int, int]
    new_tokens: int
    sampled: bool = False
    again: bool = False


CASES = (
    Case("short answer", 1, (16, 16), 8),
    Case("one prompt", 1, (64, 64), 128),
    Case("one prompt, sampled", 1, (64, 64), 128, sampled=True),
    Case("first token of a long prompt", 1, (768, 768), 1),
    Case("long prompt", 1, (768, 768), 64),
    Case("the same prompt again", 1, (768, 768), 16, again=True),
    Case("8 ragged rows", 8, (32, 256), 64),
    Case("8 ragged rows, sampled", 8, (32, 256), 64, sampled=True),
    Case("32 ragged rows", 32, (16, 64), 32),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        cases: Calls of `generate`.
        requests: Of every cell of the matrix, in a round.
        shared: Tokens that their prompts begin with, in all rounds.
        own: Fewest and most tokens of each prompt behind them.
        new: Fewest and most new tokens.
        repeats: Timed rounds, after one that is not timed.
        tokens: Predicted to see what a number format costs.
        context: Tokens that each of these is predicted from, at most.
        dtypes: The cases once more in each of these, beside the model's own.
    """

    cases: tuple[Case, ...] = CASES
    requests: int = 8
    shared: int = 256
    own: tuple[int, int] = (16, 64)
    new: tuple[int, int] = (24, 48)
    repeats: int = 5
    tokens: int = 16_384
    context: int = 512
    dtypes: tuple[str, ...] = ("float32",)


def in_small(plan: Plan) -> Plan:
    """The same with fewer tokens, for models that take a tenth of a second for a step."""
    cases = tuple(
        replace(case, rows=min(8, case.rows), new_tokens=max(1, case.new_tokens // 4))
        for case in plan.cases
        if case.rows <= 8
    )
    return replace(plan, cases=cases, requests=4, new=(8, 16), repeats=3, tokens=1024, dtypes=())


def in_miniature(plan: Plan) -> Plan:
    """A few tokens of everything, to see that it works."""
    cases = tuple(
        replace(
            case,
            rows=min(3, case.rows),
            prompt=(max(4, case.prompt[0] // 16), max(8, case.prompt[1] // 16)),
            new_tokens=min(8, case.new_tokens),
        )
        for case in plan.cases
    )
    return replace(
        plan, cases=cases, requests=3, shared=32, own=(4, 8), new=(4, 8), repeats=3, tokens=1024, context=256, dtypes=()
    )


@dataclass(frozen=True)
class Source:
    """A model that can be had in several number formats, and what its prompts are made of.

    Attributes:
        name: Of the model, in the report.
        load: Gives it in a number format, `"bfloat16"` say.
        dtype: Its own.
        texts: Tokenized texts; random ids if `None`, as for random weights.
        seed: Of what is drawn.
    """

    name: str
    load: Callable[[str], PreTrainedModel]
    dtype: str
    texts: Sequence[list[int]] | None
    seed: int = 0

    def tokens(self, model: PreTrainedModel, *seed: int) -> Callable[[int], list[int]]:
        """Gives as many tokens as asked for, others each time."""
        embeddings: Any = model.get_input_embeddings()
        rng = np.random.default_rng([self.seed, *seed])
        flat = None if self.texts is None else [token for text in self.texts for token in text]

        def take(count: int) -> list[int]:
            if flat is None:
                return rng.integers(1, embeddings.weight.shape[0], size=count).tolist()  # 0 pads, and would be masked
            start = int(rng.integers(len(flat) - count + 1))
            return flat[start : start + count]

        return take


def rounds_of(source: Source, model: PreTrainedModel, plan: Plan) -> list[list[Job]]:
    """The requests of every round, the first of which is not timed."""
    take, rng = source.tokens(model, 1), np.random.default_rng([source.seed, 2])
    shared = take(plan.shared)
    rounds = []
    for _ in range(plan.repeats + 1):
        own, new = (rng.integers(low, high + 1, plan.requests).tolist() for low, high in (plan.own, plan.new))
        rounds.append([Job(shared + take(length), count) for length, count in zip(own, new, strict=True)])
    return rounds


def cells() -> Iterator[tuple[str, ...]]:
    """Every combination of the parts that give the same tokens."""
    for number in range(2 ** len(PARTS)):
        yield tuple(part for place, part in enumerate(PARTS) if number >> place & 1)


def name_of(weights: str, pages: str, dtype: str) -> str:
    """What a pair of number formats is called.

    Example:
        >>> name_of("int4", "full", "bfloat16")
        'int4 weights, bfloat16 pages'
    """
    return f"{dtype if weights == FULL else weights} weights, {dtype if pages == FULL else pages} pages"
