"""Part 5: guesses that are confirmed, against plain decoding and against stock's assisted decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import Stats
from hf_llmopt.generation import handle_of

from .equality import compare, least
from .kv_cache import describe
from .measure import environment, interleave, paired_ratio, summary
from .report import Table, machine_text, model_text, ratio_text, same_text

PLAIN, SUFFIX, DRAFT = "plain", "suffix", "draft model"
STOCK, STOCK_LOOKUP, STOCK_ASSISTED = "stock", "stock, prompt lookup", "stock, assistant"
DECODING = "plain, decoding"  # the part of a call behind its first token
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


_ROWS = {"code": (1, 2, 4, 8, 16), "editing": (1, 8), "random": (1, 8)}
WORKLOADS = tuple(Workload(f"{kind}, {rows}", kind, rows) for kind, sizes in _ROWS.items() for rows in sizes)
QUICK = tuple(Workload(f"{kind}, 2", kind, 2, tokens=24, new_tokens=8) for kind in ("code", "editing", "random"))


@dataclass(frozen=True)
class _Run:
    output: Tensor
    seconds: float
    stats: Stats | None
    drafting: float = 0.0  # part of the seconds that the drafter took
    by_place: tuple[float, ...] = ()  # how often guesses at each place of a draft were right lately

    @property
    def decoding(self) -> float:
        """Seconds behind the first token."""
        return self.seconds if self.stats is None else self.seconds - self.stats.time_to_first_token


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

    Greedy, and EOS ends no row. Every round has prompts of its own, the same for all ways: what a drafter remembers of
    a round does not answer the next. What it has learned about chances does help, as in any process that goes on; a
    first round is not timed.

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
        given = [
            {name: value.to(model.device) for name, value in each.items()}
            for each in _prompts(model, workload, texts, seed, repeats + 1)
        ]
        calls = {name: _Way(model, iter(given), workload, way) for name, way in ways.items()}
        note = partial(on_run, workload.name)
        for name, call in calls.items():
            call()
            note(name)
        runs = interleave(calls, repeats, note)
        results.append(_result(model, workload, given[1:], runs))
    return {
        "bench": "speculative",
        "schema": 2,
        "seed": seed,
        "repeats": repeats,
        "environment": environment(),
        "model": describe(model),
        "draft": None if draft is None else describe(draft),
        "workloads": results,
        "passed": all(result["passed"] for result in results),
    }


class _Way:
    """Calls `generate` in one way, each time with the next prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Iterator[Mapping[str, Tensor]],
        workload: Workload,
        way: Mapping[str, Any],
    ) -> None:
        self._model, self._prompts, self._new_tokens, self._way = model, prompts, workload.new_tokens, way
        self._drafted = 0.0  # seconds that the drafter had taken before

    def __call__(self) -> _Run:
        # No streamer: rows that go their own way have none.
        inputs, generate = next(self._prompts), cast(Any, self._model.generate)
        began = perf_counter()
        output = generate(**inputs, max_new_tokens=self._new_tokens, do_sample=False, eos_token_id=None, **self._way)
        seconds = perf_counter() - began
        if not self._way["llmopt"]:
            return _Run(output.cpu(), seconds, None)
        handle = handle_of(self._model)
        speculator = None if handle.engine is None else handle.engine.speculator
        if speculator is None:
            return _Run(output.cpu(), seconds, handle.stats)
        before, self._drafted = self._drafted, speculator.seconds
        return _Run(output.cpu(), seconds, handle.stats, self._drafted - before, tuple(speculator.right_by_place()))


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


def _prompts(
    model: PreTrainedModel, workload: Workload, texts: Sequence[list[int]], seed: int, rounds: int
) -> list[dict[str, Tensor]]:
    """Prompts of every round; no part of a text is in two of them, as long as the texts are enough."""
    rng = np.random.default_rng([seed, workload.tokens])
    if workload.kind == "random":
        embeddings: Any = model.get_input_embeddings()
        ids = rng.integers(0, embeddings.weight.shape[0], (rounds * workload.rows, workload.tokens))
    else:
        size = workload.tokens
        parts = [text[i : i + size] for text in texts for i in range(0, len(text) - size + 1, size)]
        order = np.resize(rng.permutation(len(parts)), rounds * workload.rows)
        ids = np.asarray([parts[index] for index in order.tolist()])
        if workload.kind == "editing":  # a text, and the beginning of its repetition
            ids = np.concatenate([ids[:, : 4 * size // 5], ids[:, : size - 4 * size // 5]], axis=1)
    given = torch.as_tensor(ids).split(workload.rows)
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in given]


def _result(
    model: PreTrainedModel, workload: Workload, inputs: Sequence[Mapping[str, Tensor]], runs: Mapping[str, list[_Run]]
) -> dict[str, Any]:
    equality = {
        name: least(
            compare(model, given, stock.output, run.output)
            for given, stock, run in zip(inputs, runs[STOCK], found, strict=True)
        )
        for name, found in runs.items()
    }
    reasons = [f"{name} gave other tokens than stock" for name, outcome in equality.items() if not outcome.same]
    for run in (run for found in runs.values() for run in found):
        if run.stats is not None and run.stats.served_by != "llmopt":
            reasons.append(f"transformers served an llmopt call: {run.stats.reason}")
    ways = {}
    for name, found in runs.items():
        seconds, new = [run.seconds for run in found], workload.rows * workload.new_tokens
        like = STOCK_LOOKUP if name == SUFFIX else STOCK_ASSISTED
        over = {
            other: paired_ratio([run.seconds for run in runs[other]], seconds)
            for other in (PLAIN, like)
            if other in runs and name not in (PLAIN, other) and not reasons
        }
        if name in (SUFFIX, DRAFT) and not reasons:
            over[DECODING] = paired_ratio([run.decoding for run in runs[PLAIN]], [run.decoding for run in found])
        ways[name] = {
            "seconds": summary(seconds),
            "tokens_per_second": summary(new / each for each in seconds),
            "over": {
                other: {"ratio": r.ratio, "low": r.low, "high": r.high, "not_slower": r.not_slower}
                for other, r in over.items()
            },
            **_figures(found),
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


def _figures(runs: Sequence[_Run]) -> dict[str, Any]:
    """What the runs' stats say, all runs together; empty for stock."""
    stats = [run.stats for run in runs if run.stats is not None]
    if not stats:
        return {}
    whole, passes = sum(run.decoding for run in runs), sum(each.forward_seconds for each in stats)
    return {
        "steps": sum(each.steps for each in stats),
        "drafted_tokens": sum(each.drafted_tokens for each in stats),
        "accepted_tokens": sum(each.accepted_tokens for each in stats),
        "forward_share": passes / sum(run.seconds for run in runs),
        "drafting_share": sum(run.drafting for run in runs) / whole,
        "right_by_place": list(runs[-1].by_place),
    }


def table(report: dict[str, Any]) -> Table:
    """The table of a report: a row for each workload and way."""
    columns = [
        "workload, rows",
        "way",
        "tokens/s",
        "tokens/step",
        "right",
        "by place, %",
        "drafting",
        "same tokens",
        "× plain",
        "× plain, decoding",
        "× stock's like",
    ]
    rows = []
    for workload in report["workloads"]:
        for name, way in workload["ways"].items():
            over, drafted = way["over"], way.get("drafted_tokens")
            like = over.get(STOCK_LOOKUP if name == SUFFIX else STOCK_ASSISTED)
            new = report["repeats"] * workload["new_tokens"]
            rows.append(
                [
                    workload["name"],
                    name,
                    f"{way['tokens_per_second']['median']:.1f}",
                    f"{new / way['steps']:.2f}" if way.get("steps") else "",
                    f"{way['accepted_tokens']} of {drafted}" if drafted else "",
                    " ".join(f"{100 * share:.0f}" for share in way["right_by_place"]) if drafted else "",
                    f"{way['drafting_share']:.0%}" if drafted else "",
                    same_text(workload["equality"][name]),
                    ratio_text(over.get(PLAIN)),
                    ratio_text(over.get(DECODING)),
                    ratio_text(like if name in (SUFFIX, DRAFT) else None),
                ]
            )
    title = f"speculative: {model_text(report['model'])}"
    caption = (
        f"{machine_text(report['environment'])}; greedy; medians of {report['repeats']} interleaved runs, each with "
        "prompts of its own; × is the geometric mean of paired ratios with its 95 % interval, of whole calls or of "
        "what comes behind the first token; by place: how often guesses there were right lately, where all before them "
        "were; drafting: share of the time in the drafter; stock's like: prompt lookup or "
        "assistant"
    )
    return Table(title, columns, rows, 2, caption)
