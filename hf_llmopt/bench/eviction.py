"""What eviction costs: whether something far back is still found, and the perplexity of what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from hf_llmopt.errors import InvalidText

from .kv_cache import describe
from .measure import environment
from .report import Table

FULL = "all tokens"
METHODS = ("sink", "snapkv", "h2o", "expected", "kvzip")
RATIOS = (0.5, 0.25)
ROWS, LENGTH = 16, 704
DRAWN = 3  # needles that are drawn for each that is taken
CUE, ANSWER = 12, 4  # tokens of the needle that are given, and that have to follow
FOLLOWING = 64  # tokens of the text whose perplexity is measured
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Told(LogitsProcessor):
    """Lets the first new tokens of each row be none but the given ones, `[rows, tokens]`."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = list(tokens.T)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        if not self.tokens:
            return scores
        told = torch.full_like(scores, -1e9)
        return told.scatter_(1, self.tokens.pop(0)[:, None].to(scores.device), 0.0)


def needles(
    model: PreTrainedModel, texts: Sequence[list[int]], rows: int, length: int, seed: int = 0
) -> tuple[Tensor, Tensor, int]:
    """Texts with a passage of another text somewhere in their first three quarters, which the model can copy.

    Of `DRAWN * rows` such texts those are taken whose answer the model gives with all tokens, and does not give where
    the passage is missing: what it cannot do at all, or can guess, says nothing about eviction.

    Args:
        model: That has to copy.
        texts: Tokenized texts to cut from.
        rows: How many at most.
        length: Tokens of each.
        seed: Chooses texts and places.

    Returns:
        The texts `[rows, length]`, the passages `[rows, CUE + ANSWER]`, and how many were drawn.

    Raises:
        InvalidText: The model can copy none.
    """
    rng = np.random.default_rng([seed, rows, length])
    size, long_enough = CUE + ANSWER, [text for text in texts if len(text) >= length]
    without, contexts, inside = [], [], []
    for _ in range(DRAWN * rows):
        one, other = rng.choice(len(long_enough), size=2, replace=False)
        text, source = long_enough[one], long_enough[other]
        start, passage = rng.integers(len(text) - length + 1), rng.integers(len(source) - size + 1)
        without.append(np.asarray(text[start : start + length]))
        contexts.append(without[-1].copy())
        inside.append(np.asarray(source[passage : passage + size]))
        place = rng.integers(8, 3 * length // 4 - size)
        contexts[-1][place : place + size] = inside[-1]
    hidden, needle, plain = (torch.as_tensor(np.stack(found)) for found in (contexts, inside, without))
    cue, answer = needle[:, :CUE], needle[:, CUE:]
    found = _right(model, {}, hidden, cue, answer).all(1) & ~_right(model, {}, plain, cue, answer).all(1)
    chosen = found.nonzero()[:rows, 0]
    if not len(chosen):
        raise InvalidText(f"The model completes none of {len(hidden)} needles with all tokens: nothing can be lost.")
    return hidden[chosen], needle[chosen], len(hidden)


def _right(model: PreTrainedModel, options: dict[str, Any], prompts: Tensor, cue: Tensor, answer: Tensor) -> Tensor:
    """Which tokens of the answer the model gives when it is told the cue behind the prompt, bool `[rows, answer]`."""
    output = model.generate(  # type: ignore[operator]
        prompts.to(model.device),
        max_new_tokens=cue.shape[1] + answer.shape[1],
        logits_processor=[Told(cue)],
        llmopt={"kv_cache": options},
        **GREEDY,
    )
    return torch.eq(output[:, -answer.shape[1] :].cpu(), answer)


def windows(texts: Sequence[list[int]], rows: int, length: int) -> Tensor:
    """The first `length` tokens of texts, one row each, `[rows, length]`; of the longest again where there are few."""
    long_enough = [text for text in texts if len(text) >= length]
    cuts = [(text, start) for start in range(0, 1 << 20, length) for text in long_enough if len(text) >= start + length]
    return torch.tensor([text[start : start + length] for text, start in cuts[:rows]])


def cases(ratios: Sequence[float] = RATIOS) -> int:
    """How often `on_run` is called."""
    return 1 + len(METHODS) * len(ratios)


def bench(
    model: PreTrainedModel,
    texts: Sequence[list[int]],
    *,
    methods: Sequence[str] = METHODS,
    ratios: Sequence[float] = RATIOS,
    rows: int = ROWS,
    length: int = LENGTH,
    following: int = FOLLOWING,
    seed: int = 0,
    on_run: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure every method at every share of the prompt that it keeps.

    Recall: a passage of another text stands far back; given its first tokens the model has to continue it, greedily.
    The cue comes after the prompt (`after`), when it is decided already what is kept, or is the prompt's end
    (`within`). Perplexity is that of the text behind the prompt.

    Args:
        model: A causal language model that can do the task with all tokens.
        texts: Tokenized texts.
        methods: Of `KVCacheConfig(eviction=...)`.
        ratios: Shares of the prompt.
        rows: Prompts.
        length: Tokens of a prompt.
        following: Tokens behind it.
        seed: Of the needles.
        on_run: Called after each case.

    Returns:
        The report, ready for JSON.
    """
    contexts, needle, drawn = needles(model, texts, rows, length, seed)
    plain = windows(texts, rows, length + following)
    every = [(FULL, 1.0), *((method, ratio) for ratio in ratios for method in methods)]
    found = []
    for method, ratio in every:
        options: dict[str, Any] = {}
        if method != FULL:
            options = {"eviction": method}
            options |= {"keep_tokens": round(ratio * length)} if method == "sink" else {"keep_ratio": ratio}
        found.append(_case(model, options, contexts, needle, plain, length))
        found[-1] |= {"method": method, "ratio": ratio}
        on_run(f"{method}, {ratio:.0%}")
    reasons = [f"{case['method']}: transformers served it" for case in found if not case["served"]]
    return {
        "bench": "eviction",
        "schema": 1,
        "seed": seed,
        "environment": environment(),
        "model": describe(model),
        "rows": len(contexts),
        "drawn": drawn,
        "length": length,
        "following": following,
        "cue": CUE,
        "answer": ANSWER,
        "cases": found,
        "passed": not reasons,
        "reasons": reasons,
    }


def _case(
    model: PreTrainedModel, options: dict[str, Any], contexts: Tensor, needle: Tensor, plain: Tensor, length: int
) -> dict[str, Any]:
    cue, answer = needle[:, :CUE], needle[:, CUE:]
    texts, truth = plain[:, :length], plain[:, length:]
    asked = torch.cat([contexts[:, : length - CUE], cue], dim=1)
    after = _right(model, options, contexts, cue, answer)
    within = _right(model, options, asked, cue[:, :0], answer)
    read: Any = model.generate(  # type: ignore[operator]
        texts.to(model.device),
        max_new_tokens=truth.shape[1],
        logits_processor=[Told(truth)],
        llmopt={"kv_cache": options},
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )
    handle: Any = model.llmopt
    logits = torch.stack(read.logits, dim=1).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten().to(logits.device))
    return {
        "after": float(after.float().mean()),
        "within": float(within.float().mean()),
        "perplexity": float(loss.exp()),
        "evicted": handle.stats.evicted_tokens,
        "held": read.past_key_values.num_pages * read.past_key_values.store.page_size / len(texts),
        "served": handle.stats.served_by == "llmopt",
    }


def table(report: dict[str, Any]) -> Table:
    """The table of a report, a row for each method and share."""
    whole = report["cases"][0]
    rows = [
        [
            case["method"],
            f"{case['ratio']:.1%}",
            f"{case['held']:.0f}",
            f"{case['after']:.0%}",
            f"{case['within']:.0%}",
            f"{case['perplexity']:.2f}",
            f"{case['perplexity'] / whole['perplexity'] - 1:+.1%}",
        ]
        for case in report["cases"]
    ]
    columns = ["kept by", "of the prompt", "tokens held", "found, asked after", "asked within", "perplexity", "change"]
    machine = report["environment"]
    versions = machine["versions"]
    caption = (
        f"{report['rows']} needles in prompts of {report['length']} held-out tokens, {report['cue']} tokens given and "
        f"{report['answer']} to follow: of {report['drawn']} drawn, those that the model completes with all tokens and "
        f"not without the needle; perplexity of {report['following']} tokens behind prompts as long; "
        f"{machine['hardware']}; torch {versions['torch']}, transformers {versions['transformers']}"
    )
    return Table(f"eviction: {report['model']['architecture']}, {report['model']['dtype']}", columns, rows, 2, caption)


def failures(report: dict[str, Any]) -> list[str]:
    """Why the report did not pass."""
    return list(report["reasons"])
