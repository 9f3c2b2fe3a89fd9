"""Part 5: guesses that are confirmed, against plain decoding and against stock's assisted decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import Stats
from hf_llmopt.generation import handle_of

from .equality import worst
from .kv_cache import describe
from .measure import environment, interleave, paired_ratio, summary
from .report import Table, machine_text, model_text, ratio_text, same_text

PLAIN, SUFFIX, DRAFT = "plain", "suffix", "draft model"
STOCK, STOCK_LOOKUP, STOCK_ASSISTED = "stock", "stock, prompt lookup", "stock, assistant"
LOOKUP = 10  # tokens that stock's prompt lookup guesses


@dataclass(frozen=True)
class Workload:
    """A batch of prompts.

    Attributes:
        name: Says it in a table.
        kind: `"code"`: held-out code goes on; `"editing"`: a text that the model is to repeat, of which it has the
            beginning; `"random"`: random ids, where nothing can be guessed.
        rows: Prompts.
        tokens: Of each prompt.
        new_tokens: To generate for each.
    """

    name: str
    kind: str
    rows: int
    tokens: int = 256
    new_tokens: int = 128


WORKLOADS = tuple(Workload(f"{kind}, {rows}", kind, rows) for kind in ("code", "editing", "random") for rows in (1, 8))
QUICK = tuple(Workload(f"{kind}, 2", kind, 2, tokens=24, new_tokens=8) for kind in ("code", "editing", "random"))


@dataclass(frozen=True)
class _Run:
    output: Tensor
    seconds: float
    stats: Stats | None


def bench(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    workloads: Sequence[Workload] = WORKLOADS,
    *,
    texts: Sequence[list[int]],
    repeats: int = 5,
    seed: int = 0,
    on_run: Callable[[str, str], None] = lambda workload, way: None,
) -> dict[str, Any]:
    """Measure every workload in every way and compare the tokens of every run with stock's.

    Greedy, and EOS ends no row. What is learned about guesses in one run serves the next, as in any process that goes
    on; the first run of each way is not timed.

    Args:
        model: A causal language model.
        draft: A smaller one with the same vocabulary, or `None`.
        workloads: What to generate.
        texts: Tokenized texts to cut prompts from.
        repeats: Timed runs of each way, interleaved.
        seed: Of the prompts.
        on_run: Called with the workload's and the way's name after each run.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether all tokens were the same and llmopt served its
        calls.
    """
    results = []
    for workload in workloads:
        ways = ways_of(workload, draft)
        inputs = {name: value.to(model.device) for name, value in _prompts(model, workload, texts, seed).items()}
        calls = {name: partial(_run, model, inputs, workload, way) for name, way in ways.items()}
        note = partial(on_run, workload.name)
        for name, call in calls.items():
            call()
            note(name)
        runs = interleave(calls, repeats, note)
        results.append(_result(model, workload, inputs, runs))
    return {
        "bench": "speculative",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "environment": environment(),
        "model": describe(model),
        "draft": None if draft is None else describe(draft),
        "workloads": results,
        "passed": all(result["passed"] for result in results),
    }


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor], workload: Workload, way: Mapping[str, Any]) -> _Run:
    # No streamer: rows that go their own way have none.
    generate: Any = model.generate
    began = perf_counter()
    output = generate(**inputs, max_new_tokens=workload.new_tokens, do_sample=False, eos_token_id=None, **way)
    seconds = perf_counter() - began
    return _Run(output.cpu(), seconds, handle_of(model).stats if way["llmopt"] else None)


def ways_of(workload: Workload, draft: PreTrainedModel | None) -> dict[str, dict[str, Any]]:
    """The ways a workload is run in, with their arguments of `generate`; stock drafts for one row alone."""
    ways: dict[str, dict[str, Any]] = {
        STOCK: {"llmopt": False},
        PLAIN: {"llmopt": "kv_cache"},
        SUFFIX: {"llmopt": "speculative"},
    }
    if draft is not None:
        ways[DRAFT] = {"llmopt": {"speculative": {"draft_model": draft}}}
    if workload.rows == 1:
        ways[STOCK_LOOKUP] = {"llmopt": False, "prompt_lookup_num_tokens": LOOKUP}
        if draft is not None:
            ways[STOCK_ASSISTED] = {"llmopt": False, "assistant_model": draft}
    return ways


def _prompts(model: PreTrainedModel, workload: Workload, texts: Sequence[list[int]], seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng([seed, workload.rows, workload.tokens])
    if workload.kind == "random":
        embeddings: Any = model.get_input_embeddings()
        ids = rng.integers(0, embeddings.weight.shape[0], (workload.rows, workload.tokens))
    else:
        whole = [text for text in texts if len(text) >= workload.tokens]
        chosen = rng.choice(len(whole), workload.rows, replace=len(whole) < workload.rows)
        rows = []
        for index in chosen.tolist():
            text = whole[index][: workload.tokens]
            if workload.kind == "editing":  # a text, and the beginning of its repetition
                text = (text[: 4 * workload.tokens // 5] + text[: workload.tokens // 5 + 4])[: workload.tokens]
            rows.append(text)
        ids = np.asarray(rows)
    given = torch.as_tensor(ids)
    return {"input_ids": given, "attention_mask": torch.ones_like(given)}


def _result(
    model: PreTrainedModel, workload: Workload, inputs: Mapping[str, Tensor], runs: Mapping[str, list[_Run]]
) -> dict[str, Any]:
    expected = runs[STOCK][0].output
    equality = {name: worst(model, inputs, expected, [run.output for run in found]) for name, found in runs.items()}
    reasons = [f"{name} gave other tokens than stock" for name, outcome in equality.items() if not outcome.same]
    for run in (run for found in runs.values() for run in found):
        if run.stats is not None and run.stats.served_by != "llmopt":
            reasons.append(f"transformers served an llmopt call: {run.stats.reason}")
    ways = {}
    for name, found in runs.items():
        seconds, stats = [run.seconds for run in found], found[-1].stats
        new = workload.rows * workload.new_tokens
        over = {
            other: paired_ratio([run.seconds for run in runs[other]], seconds)
            for other in (PLAIN, STOCK_LOOKUP if name == SUFFIX else STOCK_ASSISTED)
            if other in runs and name not in (PLAIN, other) and not reasons
        }
        ways[name] = {
            "seconds": summary(seconds),
            "tokens_per_second": summary(new / each for each in seconds),
            "steps": None if stats is None else stats.steps,
            "drafted_tokens": None if stats is None else stats.drafted_tokens,
            "accepted_tokens": None if stats is None else stats.accepted_tokens,
            "over": {
                other: {"ratio": r.ratio, "low": r.low, "high": r.high, "not_slower": r.not_slower}
                for other, r in over.items()
            },
        }
    return {
        "name": workload.name,
        "kind": workload.kind,
        "rows": workload.rows,
        "tokens": workload.tokens,
        "new_tokens": workload.new_tokens,
        "ways": ways,
        "equality": {name: outcome.to_dict() for name, outcome in equality.items()},
        "passed": not reasons,
        "reasons": reasons,
    }


def table(report: dict[str, Any]) -> Table:
    """The table of a report: a row for each workload and way."""
    columns = ["workload, rows", "way", "tokens/s", "tokens/step", "right", "same tokens", "× plain", "× stock's like"]
    rows = []
    for workload in report["workloads"]:
        for name, way in workload["ways"].items():
            outcome, over = workload["equality"][name], dict(way["over"])
            plain = over.pop(PLAIN, None)
            like = next(iter(over.values()), None) if name in (SUFFIX, DRAFT) else None
            per_step = workload["new_tokens"] / way["steps"] if way["steps"] else None
            drafted = way["drafted_tokens"]
            rows.append(
                [
                    workload["name"],
                    name,
                    f"{way['tokens_per_second']['median']:.1f}",
                    f"{per_step:.2f}" if per_step else "",
                    f"{way['accepted_tokens']} of {drafted}" if drafted else "",
                    same_text(outcome),
                    ratio_text(plain),
                    ratio_text(like),
                ]
            )
    title = f"speculative: {model_text(report['model'])}"
    caption = (
        f"{machine_text(report['environment'])}; greedy; medians of {report['repeats']} interleaved runs; × is the "
        "geometric mean of paired ratios with its 95 % interval; stock's like: prompt lookup or assistant"
    )
    return Table(title, columns, rows, 2, caption)
