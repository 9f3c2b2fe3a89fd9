"""The C kernels on the CPU against stock: the experiments with their goals, and the report of measuring them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt.kernels import cpu

from .cpu_kinds import KINDS
from .equality import rounding_noise
from .kv_cache import describe
from .measure import environment
from .requests import OURS
from .workloads import Workload, build, held_out_ids, ragged_prompts

OnRun = Callable[[str, str], None]


def context(tokens: int, rows: int = 1, new_tokens: int = 33) -> Workload:
    """Rows of the same length, so that every step sees the same number of keys."""
    return Workload(f"batch {rows}, context {tokens}", rows, new_tokens, tokens, tokens)


@dataclass(frozen=True)
class Experiment:
    """What is measured on one model.

    Attributes:
        name: As `--only` takes it.
        kind: A key of `KINDS`: how it is measured.
        shape: A name in `workloads.SHAPES`, or `"demo"`, the embedded model.
        dtype: Type of the weights.
        cases: Workloads with their goals; what a goal counts is up to the kind.
    """

    name: str
    kind: str
    shape: str
    dtype: str
    cases: tuple[tuple[Workload, float | None], ...]


RAGGED = Workload("16 ragged requests", rows=16, new_tokens=32)
EXPERIMENTS = (
    Experiment(
        "decode-bfloat16", "decode", "0.5b", "bfloat16",
        ((context(128), 1.7), (context(2048), 2.8), (context(128, 8), 2.0), (context(128, 16), 2.0)),
    ),
    Experiment("long-context", "growth", "0.5b", "bfloat16", ((context(128), None), (context(8192), 1.35))),
    Experiment("throughput", "throughput", "0.5b", "bfloat16", ((RAGGED, 100.0),)),
    Experiment(
        "breakdown", "breakdown", "0.5b", "bfloat16", ((context(128), None), (context(2048), None), (RAGGED, None))
    ),
    Experiment(
        "decode-float32", "decode", "0.5b", "float32",
        ((context(128), 1.3), (context(2048), 2.0), (context(128, 8), None), (context(128, 16), None)),
    ),
    Experiment("floor", "floor", "1.2b-llama", "bfloat16", ((context(128), 1.25),)),
    Experiment(
        "embedded", "decode", "demo", "float32",
        ((Workload("batch 1", 1, 128), 1.8), (Workload("16 ragged rows", 16, 128), 3.0)),
    ),
    Experiment("opt", "decode", "opt-125m", "float32", ((context(128), 1.3),)),
    Experiment("gpt2", "decode", "gpt2-small", "float32", ((context(128), 1.3),)),
    Experiment("opt-bfloat16", "decode", "opt-125m", "bfloat16", ((context(128), 1.3),)),
    Experiment("gpt2-bfloat16", "decode", "gpt2-small", "bfloat16", ((context(128), 1.3),)),
)  # fmt: skip


def in_miniature(experiment: Experiment) -> Experiment:
    """The same on short prompts, to see that it works."""
    cases = tuple(
        (replace(w, new_tokens=5, shortest=max(4, w.shortest // 32), longest=max(8, w.longest // 32)), goal)
        for w, goal in experiment.cases
    )
    return replace(experiment, cases=cases)


def runs_of(experiment: Experiment, repeats: int) -> int:
    """How often `on_run` is called for an experiment."""
    per_case = {"decode": 2 * repeats + 2, "floor": 3 * repeats + 3, "throughput": 3 * repeats + 3, "breakdown": 2}
    return per_case.get(experiment.kind, repeats + 1) * len(experiment.cases)


def bench(
    experiments: Sequence[Experiment] = EXPERIMENTS,
    *,
    repeats: int = 5,
    seed: int = 0,
    quick: bool = False,
    on_run: OnRun = lambda experiment, run: None,
) -> dict[str, Any]:
    """Measure what the kernels gain over stock, with the tokens of the same runs compared.

    Args:
        experiments: What to measure.
        repeats: Timed runs of each way, interleaved, after one that is not timed.
        seed: Of prompts and weights.
        quick: Miniature models and prompts: no figure counts.
        on_run: Called after each run with the experiment's name and what ran.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether all tokens were the same and llmopt served its
        calls. A goal that was missed does not fail it.
    """
    results: list[dict[str, Any]] = []
    key: tuple[str, str] | None = None
    model: PreTrainedModel | None = None
    texts: list[list[int]] | None = None
    chosen: Sequence[Experiment] = [in_miniature(item) for item in experiments] if quick else experiments
    for experiment in chosen:
        if model is None or key != (experiment.shape, experiment.dtype):
            model = None  # the former one goes before the next one comes
            gc.collect()
            model, texts = _model(experiment, seed, quick)
            key = experiment.shape, experiment.dtype
        cases = [(w, goal, _inputs(model, w, texts, seed)) for w, goal in experiment.cases]
        measured = KINDS[experiment.kind](model, cases, repeats, partial(on_run, experiment.name))
        for case in measured:
            case["met"] = _met(case) if case.get("goal") and not case["reasons"] else None
        results.append(
            {
                "name": experiment.name,
                "kind": experiment.kind,
                "model": {"name": experiment.shape, **describe(model)},
                "noise": rounding_noise(model, cases[0][2]),
                "cases": measured,
            }
        )
    reasons = [reason for result in results for case in result["cases"] for reason in case["reasons"]]
    return {
        "bench": "cpu",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "quick": quick,
        "environment": environment(),
        "kernels": cpu.levels()[-1] if cpu.available() else cpu.why_not(),
        "experiments": results,
        "passed": not reasons,
    }


def _model(experiment: Experiment, seed: int, quick: bool) -> tuple[PreTrainedModel, list[list[int]] | None]:
    if experiment.shape != "demo":
        return build(experiment.shape, getattr(torch, experiment.dtype), seed, miniature=quick), None
    from hf_llmopt import demo

    model, tokenizer = demo.load()
    return model.to("cpu"), held_out_ids(tokenizer)  # type: ignore[arg-type]


def _inputs(model: PreTrainedModel, workload: Workload, texts: list[list[int]] | None, seed: int) -> dict[str, Tensor]:
    embeddings: Any = model.get_input_embeddings()
    return ragged_prompts(workload, embeddings.weight.shape[0], texts, seed)


def _met(case: dict[str, Any]) -> bool:
    """Whether a case reaches its goal, by the median of its runs."""
    if "ratio" not in case:
        return bool(case["ways"][OURS]["tokens_per_second"]["median"] >= case["goal"])
    ratio: float = case["ratio"]["ratio"]
    return ratio <= case["goal"] if "at_most" in case else ratio >= case["goal"]
