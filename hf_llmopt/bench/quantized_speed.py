"""Steps of decoding and prompts of known shapes with quantized weights, against stock in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import LLMOptConfig
from hf_llmopt.generation import handle_of

from .equality import worst
from .kv_cache import describe
from .measure import Run, generate, interleave, meet, paired_ratio, summary
from .quantized import METHODS, held, memory, output_errors, quantize
from .workloads import Workload, build, ragged_prompts

STOCK, FULL = "stock", "llmopt, bfloat16"
PREFILL = "prompt of 512"
# Times as fast as stock, by method and rows of a decode step.
GOALS: dict[tuple[str, int | str], float] = {
    ("int4", 1): 4.0, ("int4, head too", 1): 6.0, ("int4", 8): 3.5, ("int8", 1): 2.8, ("int8", 8): 3.0,
    ("int4", PREFILL): 1.0, ("int8", PREFILL): 1.5,
}  # fmt: skip
OnRun = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """A model, and the keyword that it generates with."""

    model: PreTrainedModel
    llmopt: Any = False


def measure_shape(
    shape: str,
    rows: Sequence[int],
    methods: Sequence[str],
    repeats: int,
    seed: int,
    quick: bool,
    on_run: OnRun,
    device: str = "cpu",
) -> dict[str, Any]:
    """Decode steps and a prompt of one shape, every way interleaved with the others."""
    model = build(shape, torch.bfloat16, seed, miniature=quick, device=device)
    ways = {STOCK: Way(model), FULL: Way(model, LLMOptConfig())}
    made = {}
    for name in methods:
        began = perf_counter()
        quantized = quantize(model, METHODS[name])
        made[name] = {
            "quantize_seconds": perf_counter() - began,
            **memory(quantized),
            "error": output_errors(quantized, model, [1, *rows], seed),
        }
        ways[name] = Way(quantized, LLMOptConfig(quantization=METHODS[name]))
        on_run(f"{shape}: {name} made")
    new, short, long = (5, 4, 16) if quick else (17, 16, 512)
    cases: list[tuple[Workload, str, int | str]] = [
        (Workload(f"{count} rows", count, new, short, short), "ms_per_step", count) for count in rows
    ]
    cases += [(Workload(PREFILL, 1, 1, long, long), "time_to_first_token", PREFILL)]
    return {
        "shape": shape,
        "model": describe(model),
        "bytes": held(model),
        "methods": made,
        "cases": [
            _case(ways, work, figure, goal, repeats, seed, partial(_say, on_run, f"{shape}, {work.name}"))
            for work, figure, goal in cases
        ],
    }


def _say(on_run: OnRun, where: str, what: str) -> None:
    on_run(f"{where}: {what}")


def _case(
    ways: Mapping[str, Way], workload: Workload, figure: str, goal: int | str, repeats: int, seed: int, said: OnRun
) -> dict[str, Any]:
    model = ways[STOCK].model
    embeddings: Any = model.get_input_embeddings()
    prompts = ragged_prompts(workload, embeddings.weight.shape[0], None, seed)
    inputs = {name: tensor.to(model.device) for name, tensor in prompts.items()}
    arguments = {"max_new_tokens": workload.new_tokens, "do_sample": False, "eos_token_id": None}

    def call(way: Way) -> Run:
        return generate(way.model, inputs, llmopt=way.llmopt, **arguments)

    for name, way in ways.items():  # sets everything up
        call(way)
        meet(way.model, inputs, llmopt=way.llmopt, **arguments)
        said(name)
    runs = interleave({name: partial(call, way) for name, way in ways.items()}, repeats, said)
    for way in ways.values():
        handle_of(way.model).release()  # pages of 128 rows are not kept for the next case
    times = {name: [getattr(run, figure) for run in found] for name, found in runs.items()}
    scale = 1e3 if figure == "time_to_first_token" else 1.0
    ratios = {name: paired_ratio(times[STOCK], found) for name, found in times.items() if name != STOCK}
    reasons = _objections(model, inputs, workload, runs)
    goals = GOALS if model.device.type == "cpu" else {}
    return {
        "name": workload.name,
        "rows": workload.rows,
        "prompt": workload.longest,
        "new_tokens": workload.new_tokens,
        "ms": {name: summary(scale * seconds for seconds in found) for name, found in times.items()},
        "fused": {name: list(getattr(found[-1].stats, "fused", ())) for name, found in runs.items()},
        "reasons": reasons,
        "ratios": {} if reasons else {n: {"ratio": r.ratio, "low": r.low, "high": r.high} for n, r in ratios.items()},
        "goals": {name: goals[name, goal] for name in ways if (name, goal) in goals},
    }


def _objections(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], workload: Workload, runs: Mapping[str, list[Run]]
) -> list[str]:
    """Why the times must not be compared. What quantized weights compute is checked apart, `output_errors`."""
    reasons = []
    outcome = worst(model, inputs, runs[STOCK][0].output, [run.output for run in runs[FULL]])
    if not outcome.same:
        reasons.append(f"{FULL}: other tokens than stock ({outcome.farthest})")
    for name, found in runs.items():
        if any(run.output.shape[1] - run.prompt_length != workload.new_tokens for run in found):
            reasons.append(f"{name}: not {workload.new_tokens} new tokens")
        # A GPU reads the pages of a graph by another kernel than those of an eager pass: near ties may fall otherwise.
        if model.device.type == "cpu" and any(not torch.equal(run.output, found[0].output) for run in found):
            reasons.append(f"{name}: other tokens in every run")
        stats = [run.stats for run in found if run.stats is not None]
        reasons += sorted({f"{name}: transformers served: {s.reason}" for s in stats if s.served_by != "llmopt"})
    return reasons
