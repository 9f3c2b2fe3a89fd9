"""Part 1: the paged KV cache against no cache and against stock's cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from .equality import Equality, worst
from .flash_attention import read_bandwidth
from .measure import Run, cache_bytes, environment, generate, interleave, meet, paired_ratio, summary, weight_bytes
from .workloads import Workload, ragged_prompts

STOCK, NO_CACHE, OURS = "stock", "no cache", "llmopt"
WAYS: dict[str, dict[str, Any]] = {
    NO_CACHE: {"use_cache": False},
    STOCK: {},
    OURS: {"llmopt": "kv_cache"},
}
REPLAYED: dict[str, Any] = {"llmopt": {"graphs": True}}  # our way with CUDA graphs
WORKLOADS = (
    Workload("batch-1", rows=1, new_tokens=128),
    Workload("batch-8", rows=8, new_tokens=128),
    Workload("batch-16", rows=16, new_tokens=128),
    Workload("long", rows=1, new_tokens=512),
)
QUICK = (
    Workload("batch-1", rows=1, new_tokens=8, shortest=8, longest=16),
    Workload("batch-4", rows=4, new_tokens=8, shortest=8, longest=16),
    Workload("long", rows=1, new_tokens=16, shortest=8, longest=16),
)
WITHOUT_CACHE = ("long",)  # without a cache every step computes all tokens again: once is enough to see it


def bench(
    model: PreTrainedModel,
    workloads: Sequence[Workload] = WORKLOADS,
    *,
    texts: Sequence[list[int]] | None = None,
    repeats: int = 5,
    seed: int = 0,
    graphs: bool = False,
    on_run: Callable[[str, str], None] = lambda workload, way: None,
) -> dict[str, Any]:
    """Measure every workload in every way and compare the tokens of every run with stock's.

    Greedy, and EOS ends no row: all rows run to the end, so that every way does the same work.

    Args:
        model: A causal language model.
        workloads: What to generate; `"long"` is also run without a cache.
        texts: Tokenized texts to cut prompts from; random ids if `None`.
        repeats: Timed runs of each way, interleaved, after one that is not timed.
        seed: Of the prompts.
        graphs: Measure every workload once more with `graphs=True`.
        on_run: Called with the workload's and the way's name after each run.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether all tokens were the same and llmopt served its
        calls. On a GPU it also says how long reading the weights takes.
    """
    floor = {"floor_ms_per_step": _floor(model)} if model.device.type == "cuda" else {}
    results = [
        _workload(model, workload, replayed, texts, repeats, seed, on_run)
        for workload in workloads
        for replayed in ([False, True] if graphs else [False])
    ]
    return {
        "bench": "kv_cache",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "prompts": "random ids" if texts is None else "held-out text",
        "environment": environment(),
        "model": describe(model),
        "baseline": STOCK,
        "workloads": results,
        "passed": all(result["passed"] for result in results),
        **floor,
    }


def ways_of(workload: Workload, replayed: bool = False) -> dict[str, dict[str, Any]]:
    """The ways a workload is run in, with their arguments of `generate`; `replayed`, ours with CUDA graphs."""
    if replayed:
        return {STOCK: WAYS[STOCK], OURS: REPLAYED}
    return {name: way for name, way in WAYS.items() if name != NO_CACHE or workload.name in WITHOUT_CACHE}


def _floor(model: PreTrainedModel) -> float:
    """Milliseconds that a GPU takes to read every weight that a step of one row reads, at the bandwidth it reaches."""
    return 1e3 * weight_bytes(model) / read_bandwidth()


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a report says about a model."""
    return {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
    }


def _workload(
    model: PreTrainedModel,
    workload: Workload,
    replayed: bool,
    texts: Sequence[list[int]] | None,
    repeats: int,
    seed: int,
    on_run: Callable[[str, str], None],
) -> dict[str, Any]:
    embeddings: Any = model.get_input_embeddings()
    prompts = ragged_prompts(workload, embeddings.weight.shape[0], texts, seed)
    inputs = {name: tensor.to(model.device) for name, tensor in prompts.items()}
    ways, shown = ways_of(workload, replayed), workload.name + ", graphs" * replayed
    arguments = {"max_new_tokens": workload.new_tokens, "do_sample": False, "eos_token_id": None}
    held = {}
    for name, way in ways.items():  # sets every way up, and shows what stock's cache holds in the end
        held[name] = _kv_bytes(model, inputs, {**arguments, **way})
        meet(model, inputs, **{**arguments, **way})
        on_run(shown, name)
    runs = interleave(
        {name: lambda way=way: generate(model, inputs, **arguments, **way) for name, way in ways.items()},  # type: ignore[misc]
        repeats,
        lambda name: on_run(shown, name),
    )
    expected = runs[STOCK][0].output
    equality = {name: worst(model, inputs, expected, (run.output for run in found)) for name, found in runs.items()}
    reasons = _objections(workload, inputs, runs, equality)
    if replayed and (idle := [run.stats for run in runs[OURS] if run.stats and not run.stats.graph_steps]):
        reasons.append(f"no step came from a graph: {idle[0].no_graphs or 'none was met three times'}")
    return {
        "name": shown,
        "rows": workload.rows,
        "prompt_lengths": inputs["attention_mask"].sum(1).tolist(),
        "new_tokens": workload.new_tokens,
        "ways": {name: _figures(runs[name], held[name]) for name in ways},
        "equality": {name: outcome.to_dict() for name, outcome in equality.items()},
        "passed": not reasons,
        "reasons": reasons,
        # Nothing is said about speed unless the tokens are the same.
        "ratios": [] if reasons else _ratios(runs),
    }


def _kv_bytes(model: PreTrainedModel, inputs: Mapping[str, Tensor], arguments: dict[str, Any]) -> int:
    """Bytes of the keys and values that the call holds at its end."""
    if arguments.get("llmopt"):
        stats = generate(model, inputs, **arguments).stats
        return stats.page_bytes if stats is not None else 0
    output = model.generate(**inputs, **arguments, llmopt=False, return_dict_in_generate=True)  # type: ignore[operator]
    return cache_bytes(output.past_key_values)


def _objections(
    workload: Workload,
    inputs: Mapping[str, Tensor],
    runs: Mapping[str, list[Run]],
    equality: Mapping[str, Equality],
) -> list[str]:
    """Why the workload's times must not be compared."""
    reasons = [
        f"{name} gave other tokens than stock ({outcome.farthest})"
        for name, outcome in equality.items()
        if not outcome.same
    ]
    length = inputs["input_ids"].shape[1] + workload.new_tokens
    for name, repeats in runs.items():
        if any(run.output.shape[1] != length for run in repeats):
            reasons.append(f"{name} did not generate {workload.new_tokens} tokens")
    stats = [run.stats for run in runs[OURS] if run.stats is not None]
    for reason in {s.reason for s in stats if s.served_by != "llmopt"}:
        reasons.append(f"transformers served the llmopt calls: {reason}")
    return reasons


def _figures(runs: list[Run], held: int) -> dict[str, Any]:
    stats = runs[-1].stats
    return {
        "seconds": summary(run.seconds for run in runs),
        "tokens_per_second": summary(run.tokens_per_second for run in runs),
        "time_to_first_token": summary(run.time_to_first_token for run in runs),
        "ms_per_step": summary(run.ms_per_step for run in runs),
        "overhead_ms_per_step": summary(run.stats.overhead_ms_per_step for run in runs if run.stats) if stats else None,
        "kv_bytes": held,
        "pages": stats.pages if stats else None,
        "served_by": runs[-1].served_by,
        "attention": list(stats.attention) if stats else None,
        "graph_steps": stats.graph_steps if stats else None,
    }


def _ratios(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    ratios = []
    for baseline, way in ((NO_CACHE, STOCK), (NO_CACHE, OURS), (STOCK, OURS)):
        if baseline in runs:
            found = paired_ratio([run.seconds for run in runs[baseline]], [run.seconds for run in runs[way]])
            ratios.append(
                {
                    "way": way,
                    "over": baseline,
                    "ratio": found.ratio,
                    "low": found.low,
                    "high": found.high,
                    "not_slower": found.not_slower,
                }
            )
    return ratios
