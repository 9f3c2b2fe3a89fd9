"""How the CPU benchmark measures: steps, throughput, distance to the memory's bandwidth, shares of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import Engine
from hf_llmopt.kernels import cpu

from .breakdown import Marks, instrumented
from .equality import Equality, worst
from .measure import Run, generate, interleave, paired_ratio, summary, weight_bytes
from .requests import BATCHED, OURS, Done, Job, batched, ours
from .workloads import Workload

STOCK = "stock"
LLMOPT = "kv_cache"  # the kernels serve every part; prompts are computed anew in every run


def _arguments(workload: Workload) -> dict[str, Any]:
    return {"max_new_tokens": workload.new_tokens, "do_sample": False, "eos_token_id": None}


Case = tuple[Workload, float | None, dict[str, Tensor]]


def _decode(model: PreTrainedModel, cases: Sequence[Case], repeats: int, said: Callable[[str], None]) -> list[Any]:
    """Milliseconds of a decode step, from the first token to the last, against stock."""
    return [_pair(model, case, repeats, said) for case in cases]


def _pair(
    model: PreTrainedModel,
    case: Case,
    repeats: int,
    said: Callable[[str], None],
    beside: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    workload, goal, inputs = case
    ways: dict[str, Callable[[], Any]] = {
        STOCK: lambda: generate(model, inputs, **_arguments(workload)),
        OURS: lambda: generate(model, inputs, **_arguments(workload), llmopt=LLMOPT),
        **(beside or {}),
    }
    for name, way in ways.items():  # sets everything up
        way()
        said(f"{workload.name}, {name}")
    runs = interleave(ways, repeats, lambda name: said(f"{workload.name}, {name}"))
    outcome = worst(model, inputs, runs[STOCK][0].output, [run.output for run in runs[OURS]])
    reasons = _objections(workload, runs[OURS], outcome)
    steps = [[run.ms_per_step for run in runs[name]] for name in (STOCK, OURS)]
    seconds = [[run.seconds for run in runs[name]] for name in (STOCK, OURS)]
    return {
        "name": workload.name,
        "rows": workload.rows,
        "new_tokens": workload.new_tokens,
        "prompt_lengths": inputs["attention_mask"].sum(1).tolist(),
        "ways": {name: _figures(runs[name]) for name in (STOCK, OURS)},
        "equality": outcome.to_dict(),
        "reasons": reasons,
        "goal": goal,
        "ratio": None if reasons else asdict(paired_ratio(*steps)),
        "whole_call": None if reasons else asdict(paired_ratio(*seconds)),
        **{name: runs[name] for name in beside or {}},
    }


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    stats = runs[-1].stats
    return {
        "ms_per_step": summary(run.ms_per_step for run in runs),
        "seconds": summary(run.seconds for run in runs),
        "time_to_first_token": summary(run.time_to_first_token for run in runs),
        "attention": list(stats.attention) if stats else None,
        "fused": list(getattr(stats, "fused", ())) if stats else None,
    }


def _objections(workload: Workload, ours: Sequence[Run], outcome: Equality | None = None) -> list[str]:
    """Why the times must not be compared."""
    reasons = ["other tokens than stock"] if outcome is not None and not outcome.same else []
    if any(run.output.shape[1] - run.prompt_length != workload.new_tokens for run in ours):
        reasons.append(f"not {workload.new_tokens} new tokens")
    stats = [run.stats for run in ours if run.stats is not None]
    reasons += sorted({f"transformers served the call: {s.reason}" for s in stats if s.served_by != "llmopt"})
    if cpu.available() and any("cpu" not in s.attention for s in stats if s.served_by == "llmopt"):
        reasons.append("the attention kernel did not run")
    return reasons


def _growth(model: PreTrainedModel, cases: Sequence[Case], repeats: int, said: Callable[[str], None]) -> list[Any]:
    """How much longer a step of llmopt takes at the last context than at the first.

    Tokens at the longest context are compared with stock's once, as its prompt alone takes stock long.
    """
    ways: dict[str, Callable[[], Run]] = {
        workload.name: lambda w=workload, i=inputs: generate(model, i, **_arguments(w), llmopt=LLMOPT)  # type: ignore[misc]
        for workload, _, inputs in cases
    }
    for name, way in ways.items():
        way()
        said(name)
    runs = interleave(ways, repeats, said)
    (first, _, _), (last, goal, inputs) = cases[0], cases[-1]
    expected = generate(model, inputs, **_arguments(last)).output
    outcome = worst(model, inputs, expected, [run.output for run in runs[last.name]])
    reasons = [r for w, _, _ in cases for r in _objections(w, runs[w.name], outcome if w is last else None)]
    times = {name: [run.ms_per_step for run in found] for name, found in runs.items()}
    return [
        {
            "name": f"{last.name} over {first.name}",
            "ways": {name: _figures(found) for name, found in runs.items()},
            "equality": outcome.to_dict(),
            "reasons": reasons,
            "at_most": goal,
            "goal": goal,
            "ratio": None if reasons else asdict(paired_ratio(times[last.name], times[first.name])),
        }
    ]


def _floor(model: PreTrainedModel, cases: Sequence[Case], repeats: int, said: Callable[[str], None]) -> list[Any]:
    """A step's time over the time that reading the weights once takes at the bandwidth measured beside it."""
    buffer = torch.ones(1 << (27 if model.num_parameters() > 1 << 27 else 20), dtype=torch.int64)
    read = weight_bytes(model)
    results = []
    for case in cases:
        result = _pair(model, case, repeats, said, {"read": lambda: read_bandwidth(buffer)})
        rates: list[float] = result.pop("read")
        floors = [1e3 * read / rate for rate in rates]
        times = result["ways"][OURS]["ms_per_step"]["samples"]
        result |= {
            "weight_bytes": read,
            "bytes_per_second": summary(rates),
            "floor_ms": summary(floors),
            "at_most": case[1],
            "over_stock": result["ratio"],
            "ratio": None if result["reasons"] else asdict(paired_ratio(times, floors)),
        }
        results.append(result)
    return results


def read_bandwidth(buffer: Tensor, passes: int = 3) -> float:
    """Bytes per second of reading a buffer with torch's threads, the best of several passes and two ways of reading.

    Args:
        buffer: int64; much larger than the caches.
        passes: How often each way reads all of it.
    """
    size, best = buffer.numel() * buffer.element_size(), 0.0
    ways: list[Callable[[], Any]] = [buffer.sum]
    if cpu.available():  # as the kernel streams a weight; the numbers do not matter
        weight = buffer.view(torch.bfloat16).view(-1, 2048)
        x = torch.zeros(1, 2048, dtype=torch.bfloat16)
        ways.append(lambda: cpu.linear(x, weight))
    for way in ways:
        for _ in range(passes):
            began = perf_counter()
            way()
            best = max(best, size / (perf_counter() - began))
    return best


def _throughput(model: PreTrainedModel, cases: Sequence[Case], repeats: int, said: Callable[[str], None]) -> list[Any]:
    """Tokens per second of requests that come at once, prompts included."""
    results = []
    for workload, goal, inputs in cases:
        jobs = [Job(i[m.bool()].tolist(), workload.new_tokens) for i, m in zip(*inputs.values(), strict=True)]
        with Engine(model, LLMOPT) as engine:
            ways: dict[str, Callable[[], Done]] = {
                STOCK: partial(_padded, model, workload, inputs),
                OURS: partial(ours, engine, jobs),
            }
            refused = None
            try:
                batched(model, jobs)
                ways[BATCHED] = partial(batched, model, jobs)
            except Exception as error:  # stock's own batching has demands of its own
                refused = f"{type(error).__name__}: {error}"
            ways[OURS]()
            ways[STOCK]()
            for name in (STOCK, OURS, BATCHED):
                said(f"{workload.name}, {name}")
            runs = interleave(ways, repeats, said)
        expected = torch.cat([inputs["input_ids"], torch.tensor(runs[STOCK][0].tokens)], dim=1)
        outcomes, reasons = {}, []
        for name, found in runs.items():
            wrong = [run for run in found if {len(row) for row in run.tokens} != {workload.new_tokens}]
            if wrong:
                reasons.append(f"{name}: not {workload.new_tokens} new tokens")
                continue
            outputs = [torch.cat([inputs["input_ids"], torch.tensor(run.tokens)], dim=1) for run in found]
            outcomes[name] = worst(model, inputs, expected, outputs)
        if OURS in outcomes and not outcomes[OURS].same:
            reasons.append("other tokens than stock")
        reasons += [f"transformers served the call: {r}" for r in {r for run in runs[OURS] for r in run.refusals}]
        total = workload.rows * workload.new_tokens
        seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
        results.append(
            {
                "name": workload.name,
                "prompt_lengths": inputs["attention_mask"].sum(1).tolist(),
                "new_tokens": workload.new_tokens,
                "ways": {name: {"tokens_per_second": summary(total / s for s in t)} for name, t in seconds.items()},
                "equality": {name: outcome.to_dict() for name, outcome in outcomes.items()},
                "refused": refused,
                "reasons": reasons,
                "goal": goal,
                "ratios": {
                    name: asdict(paired_ratio(seconds[STOCK], found))
                    for name, found in seconds.items()
                    if name != STOCK and not reasons
                },
            }
        )
    return results


def _padded(model: PreTrainedModel, workload: Workload, inputs: Mapping[str, Tensor]) -> Done:
    run = generate(model, inputs, **_arguments(workload))
    return Done(run.seconds, run.output[:, run.prompt_length :].tolist())


def _breakdown(model: PreTrainedModel, cases: Sequence[Case], repeats: int, said: Callable[[str], None]) -> list[Any]:
    """Where the time of a decode step goes: one run, with the entry points of the kernels timed."""
    results = []
    for workload, _, inputs in cases:
        arguments = _arguments(workload)
        plain = generate(model, inputs, **arguments, llmopt=LLMOPT)
        said(f"{workload.name}, warm")
        with instrumented() as spent:
            clock = Marks(spent)
            run = generate(model, inputs, **arguments, llmopt=LLMOPT, streamer=clock)
        said(f"{workload.name}, timed")
        reasons = _objections(workload, [run])
        if not torch.equal(plain.output, run.output):
            reasons.append("other tokens than without the clocks")
        results.append(
            {
                "name": workload.name,
                "steps": workload.new_tokens - 1,
                "ms_per_step": 1e3 * (clock.times[-1] - clock.times[1]) / (workload.new_tokens - 1),
                "ms_per_step_without_clocks": plain.ms_per_step,
                "ms": {part: 1e3 * spent / (workload.new_tokens - 1) for part, spent in clock.parts().items()},
                "reasons": reasons,
            }
        )
    return results


KINDS: dict[str, Callable[[PreTrainedModel, Sequence[Case], int, Callable[[str], None]], list[Any]]] = {
    "decode": _decode,
    "growth": _growth,
    "floor": _floor,
    "throughput": _throughput,
    "breakdown": _breakdown,
}
