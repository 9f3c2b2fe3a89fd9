"""Part 2: prompts that are found, against prompts that are computed and against stock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt.generation import handle_of

from .equality import Equality, worst
from .kv_cache import describe
from .measure import Run, environment, generate, interleave, paired_ratio, summary
from .report import Table, model_text, ratio_text, same_text

STOCK, COLD, MEMORY, DISK = "stock", "computed", "memory", "disk"
OnRun = Callable[[str, str], None]


@dataclass(frozen=True)
class Workload:
    """Prompts that begin alike, or a conversation.

    Attributes:
        name: Says it in a table.
        shared: Tokens that every prompt begins with, or of the document that a conversation is about.
        own: Tokens of each prompt behind them; of a conversation, tokens that the user says in a turn.
        new_tokens: Tokens to generate for each prompt or turn.
        turns: Turns of a conversation, 0 for prompts.
    """

    name: str
    shared: int
    own: int
    new_tokens: int = 8
    turns: int = 0


WORKLOADS = (
    Workload("prefix-0", shared=0, own=512),
    Workload("prefix-50", shared=256, own=256),
    Workload("prefix-90", shared=460, own=52),
    Workload("long-prefix", shared=2000, own=32),
    Workload("chat", shared=0, own=24, new_tokens=24, turns=10),
    Workload("agent", shared=800, own=40, new_tokens=24, turns=6),
)
QUICK = (
    Workload("prefix-0", shared=0, own=40, new_tokens=4),
    Workload("prefix-90", shared=36, own=6, new_tokens=4),
    Workload("chat", shared=0, own=6, new_tokens=4, turns=3),
)


def bench(
    model: PreTrainedModel,
    workloads: Sequence[Workload] = WORKLOADS,
    *,
    texts: Sequence[list[int]] | None = None,
    repeats: int = 5,
    seed: int = 0,
    on_run: OnRun = lambda workload, way: None,
) -> dict[str, Any]:
    """Measure the time to the first token of prompts that were computed before, and compare all tokens with stock's.

    Greedy, one prompt at a time, and EOS ends none. Every timed prompt has an end of its own, so that nothing but the
    shared beginning is found. For `"disk"` each run gets a new engine that knows the folder only.

    Args:
        model: A causal language model.
        workloads: What to generate.
        texts: Tokenized texts to cut prompts from; random ids if `None`.
        repeats: Timed runs of each way, interleaved.
        seed: Of the prompts.
        on_run: Called with the workload's and the way's name after each run.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether all tokens were the same, llmopt served its calls,
        and what was to be found was found.
    """
    results = []
    for workload in workloads:
        source = _source(model, texts, [seed, workload.shared, workload.own])
        measured = _chat if workload.turns else _prompts
        with TemporaryDirectory() as folder:
            results.append(measured(model, workload, source, repeats, folder, on_run))
        handle_of(model).release()
    return {
        "bench": "prompt_cache",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "prompts": "random ids" if texts is None else "held-out text",
        "environment": environment(),
        "model": describe(model),
        "baseline": STOCK,
        "workloads": results,
        "passed": all(result["passed"] for result in results),
    }


def runs_of(workload: Workload, repeats: int) -> int:
    """How often `bench` calls `on_run` for a workload."""
    return repeats * (2 if workload.turns else 4)


def _source(model: PreTrainedModel, texts: Sequence[list[int]] | None, seed: list[int]) -> Callable[[int], list[int]]:
    """Gives as many tokens as asked for, others each time."""
    embeddings: Any = model.get_input_embeddings()
    rng = np.random.default_rng(seed)

    def take(count: int) -> list[int]:
        if texts is None:
            return rng.integers(0, embeddings.weight.shape[0], size=count).tolist()
        tokens: list[int] = []
        while len(tokens) < count:  # long prompts go over several texts
            text = texts[int(rng.integers(len(texts)))]
            tokens += text[int(rng.integers(len(text))) :][: count - len(tokens)]
        return tokens

    return take


def _inputs(model: PreTrainedModel, tokens: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor([tokens], device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _prompts(
    model: PreTrainedModel,
    workload: Workload,
    source: Callable[[int], list[int]],
    repeats: int,
    folder: str,
    on_run: OnRun,
) -> dict[str, Any]:
    arguments: dict[str, Any] = {"max_new_tokens": workload.new_tokens, "do_sample": False, "eos_token_id": None}
    shared = source(workload.shared)
    prompts = [_inputs(model, shared + source(workload.own)) for _ in range(repeats)]
    memory, disk = {"prompt_cache": {"salt": "memory"}}, {"prompt_cache": {"path": str(Path(folder) / "pages")}}
    short = _inputs(model, source(2))
    for way in (False, memory, disk):  # sets every way up, and computes the shared beginning once
        generate(model, _inputs(model, shared) if shared else short, llmopt=way, **arguments)
    turn = {way: iter(enumerate(prompts)) for way in (STOCK, COLD, MEMORY, DISK)}

    def run(way: str) -> Run:
        number, inputs = next(turn[way])
        if way == DISK:
            handle_of(model).release()
        # Nobody shares the salts of the way that computes.
        asked = {STOCK: False, COLD: {"prompt_cache": {"salt": f"computed {number}"}}, MEMORY: memory, DISK: disk}[way]
        if asked:  # makes the engine, which one way's new one may have cost the others
            generate(model, _inputs(model, shared) if shared and way == MEMORY else short, llmopt=asked, **arguments)
        return generate(model, inputs, llmopt=asked, **arguments)

    runs = interleave({way: lambda way=way: run(way) for way in turn}, repeats, lambda way: on_run(workload.name, way))  # type: ignore[misc]
    equality = {way: _worst(model, prompts, runs[STOCK], found) for way, found in runs.items()}
    whole = workload.shared - workload.shared % 16  # of the shared tokens, those in whole pages
    reasons = [f"{way} gave other tokens than stock" for way, outcome in equality.items() if not outcome.same]
    reasons += _not_served(run for way in (COLD, MEMORY, DISK) for run in runs[way])
    found = {way: [run.stats.cached_tokens if run.stats else 0 for run in its] for way, its in runs.items()}
    reasons += [f"{way} found {min(found[way])} of {whole} tokens" for way in (MEMORY,) if min(found[way]) < whole]
    return {
        "name": workload.name,
        "shared": workload.shared,
        "own": workload.own,
        "new_tokens": workload.new_tokens,
        "ways": {
            way: {
                "time_to_first_token": summary(run.time_to_first_token for run in its),
                "seconds": summary(run.seconds for run in its),
                "cached_tokens": found[way],
            }
            for way, its in runs.items()
        },
        "equality": {way: outcome.to_dict() for way, outcome in equality.items()},
        "passed": not reasons,
        "reasons": reasons,
        # Nothing is said about speed unless the tokens are the same.
        "ratios": [] if reasons else _ratios(runs),
    }


def _chat(
    model: PreTrainedModel,
    workload: Workload,
    source: Callable[[int], list[int]],
    repeats: int,
    folder: str,
    on_run: OnRun,
) -> dict[str, Any]:
    """A conversation whose prompt is all that was said; each repeat is another one."""
    arguments: dict[str, Any] = {"max_new_tokens": workload.new_tokens, "do_sample": False, "eos_token_id": None}
    said = [(source(workload.shared), [source(workload.own) for _ in range(workload.turns)]) for _ in range(repeats)]
    turn = {way: iter(said) for way in (STOCK, MEMORY)}
    for way in (False, "prompt_cache"):
        generate(model, _inputs(model, source(2)), llmopt=way, **arguments)

    def converse(way: str) -> list[Run]:
        history, turns = next(turn[way])
        runs = []
        for words in turns:
            asked = "prompt_cache" if way == MEMORY else False
            runs.append(generate(model, _inputs(model, history + words), llmopt=asked, **arguments))
            history = runs[-1].output[0].tolist()
        return runs

    talks = interleave(
        {way: lambda way=way: converse(way) for way in turn},  # type: ignore[misc]
        repeats,
        lambda way: on_run(workload.name, way),
    )
    runs = {way: [run for talk in its for run in talk] for way, its in talks.items()}
    prompts = [_inputs(model, run.output[0, : run.prompt_length].tolist()) for run in runs[STOCK]]
    equality = {way: _worst(model, prompts, runs[STOCK], found) for way, found in runs.items()}
    reasons = [f"{way} gave other tokens than stock" for way, outcome in equality.items() if not outcome.same]
    reasons += _not_served(runs[MEMORY])
    computed = [run.prompt_length - (run.stats.cached_tokens if run.stats else 0) for run in runs[MEMORY]]
    new = repeats * (workload.shared + workload.turns * workload.own)
    return {
        "name": workload.name,
        "turns": workload.turns,
        "shared": workload.shared,
        "own": workload.own,
        "new_tokens": workload.new_tokens,
        "prompt_tokens": sum(run.prompt_length for run in runs[MEMORY]),
        "prefilled_tokens": sum(computed),
        "new_prompt_tokens": new,
        "ways": {
            way: {
                "time_to_first_token": summary(run.time_to_first_token for run in its),
                "seconds": summary(sum(run.seconds for run in talk) for talk in talks[way]),
                "cached_tokens": [run.stats.cached_tokens if run.stats else 0 for run in its],
            }
            for way, its in runs.items()
        },
        "equality": {way: outcome.to_dict() for way, outcome in equality.items()},
        "passed": not reasons,
        "reasons": reasons,
        "ratios": [] if reasons else _ratios(runs),
    }


def _worst(
    model: PreTrainedModel, prompts: Sequence[Mapping[str, Tensor]], expected: Sequence[Run], found: Sequence[Run]
) -> Equality:
    outcomes = [
        worst(model, inputs, theirs.output, [ours.output])
        for inputs, theirs, ours in zip(prompts, expected, found, strict=True)
    ]
    return min(outcomes, key=lambda outcome: (outcome.same, outcome.identical))


def _not_served(runs: Iterator[Run] | Sequence[Run]) -> list[str]:
    found = {run.stats.reason or "" for run in runs if run.stats is not None and run.stats.served_by != "llmopt"}
    return [f"transformers served the llmopt calls: {reason}" for reason in sorted(found)]


def _ratios(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """How many times as early the first token comes."""
    ratios = []
    for over in (STOCK, COLD):
        for way in (COLD, MEMORY, DISK):
            if over in runs and way in runs and over != way:
                pair = ([run.time_to_first_token for run in runs[name]] for name in (over, way))
                ratio = paired_ratio(*pair)
                ratios.append({"way": way, "over": over, "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high})
    return ratios


def table(report: dict[str, Any]) -> Table:
    """The table of a report.

    Args:
        report: As `bench` returned it, or as read back from JSON.
    """
    rows = []
    for workload in report["workloads"]:
        for name, way in workload["ways"].items():
            found = {ratio["over"]: ratio for ratio in workload["ratios"] if ratio["way"] == name}
            speed = [ratio_text(found.get(over)) if workload["passed"] else "FAILED" for over in (STOCK, COLD)]
            first = f"{way['time_to_first_token']['median'] * 1e3:.1f}"
            cached = f"{sum(way['cached_tokens']) / len(way['cached_tokens']):.0f}"
            rows.append([workload["name"], name, first, cached, same_text(workload["equality"][name]), *speed])
    chats = [
        f"{w['name']}: {w['prefilled_tokens']} of {w['prompt_tokens']} prompt tokens computed, "
        f"{w['new_prompt_tokens']} new"
        for w in report["workloads"]
        if "turns" in w
    ]
    caption = "; ".join(
        [
            report["environment"]["hardware"],
            f"greedy; prompts: {report['prompts']}; medians of {report['repeats']} interleaved runs",
            "× is how many times as early the first token comes, with its 95 % interval",
            *chats,
        ]
    )
    columns = ["workload", "way", "first token ms", "found tokens", "same tokens", "× stock", "× computed"]
    title = f"prompt_cache: {model_text(report['model'])}"
    return Table(title, columns, rows, 2, caption)
