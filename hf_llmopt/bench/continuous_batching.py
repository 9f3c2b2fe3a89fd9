"""Part 6: many requests of different lengths, against stock's `generate` and stock's own continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from threading import Thread
from time import perf_counter, sleep
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hf_llmopt import Engine, RequestHandle
from hf_llmopt.engine.scheduler import Plan

from .equality import compare_answers
from .kv_cache import describe
from .measure import environment, interleave, paired_ratio, summary
from .requests import BATCHED, OURS, Done, Job, Load, arguments, batched, jobs, ours, stock

LLMOPT = "continuous_batching"
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25)  # request rates of the sweep, of what the engine can serve at most
OnRun = Callable[[str, str], None]


@dataclass(frozen=True)
class Limits:
    """What a user accepts: seconds to the first token, and seconds per token after it."""

    first: float = 1.0
    each: float = 0.1


def bench(
    model: PreTrainedModel,
    loads: Sequence[Load],
    *,
    texts: Sequence[list[int]] | None = None,
    repeats: int = 3,
    padded: int | None = None,
    seed: int = 0,
    limits: Limits = Limits(),
    on_run: OnRun = lambda load, way: None,
) -> dict[str, Any]:
    """Measure throughput of every load, and latencies of the first one at several request rates.

    Greedy, and EOS ends no request, so that every way does the same work.

    Args:
        model: A causal language model.
        loads: What to generate.
        texts: Tokenized texts to cut prompts from; random ids if `None`.
        repeats: Timed runs of each way, interleaved, after one that is not timed.
        padded: The baseline is stock `generate` in padded batches of so many requests, instead of one by one.
        seed: Of prompts, lengths and arrivals.
        limits: What counts as good in the sweep.
        on_run: Called with the load's and the way's name after each run.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether all tokens were those of the baseline.
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    drawn = {load.name: jobs(load, vocabulary, texts, seed) for load in loads}
    results = [
        _throughput(model, load, drawn[load.name], repeats, padded, partial(on_run, load.name)) for load in loads
    ]
    first = results[0]
    rates = None
    if first["passed"]:
        capacity = loads[0].requests / first["ways"][OURS]["seconds"]["median"]
        rates = _sweep(model, drawn[loads[0].name], capacity, seed, limits, partial(on_run, "rates"))
    return {
        "bench": "continuous_batching",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "prompts": "random ids" if texts is None else "held-out text",
        "environment": environment(),
        "model": describe(model),
        "baseline": baseline(padded),
        "loads": results,
        "rates": rates,
        "timeline": timeline(model, drawn[loads[0].name][:12]),
        "passed": all(result["passed"] for result in results) and (rates is None or rates["passed"]),
    }


def runs_of(loads: Sequence[Load], repeats: int) -> int:
    """How often `on_run` is called."""
    return len(loads) * 3 * (repeats + 1) + len(SHARES)


# ---------------------------------------------------------------------------------------------------------- throughput


def baseline(padded: int | None) -> str:
    """What the way that the others are compared with is called."""
    return "stock, one by one" if padded is None else f"stock, padded batches of {padded}"


def _throughput(
    model: PreTrainedModel,
    load: Load,
    requests: list[Job],
    repeats: int,
    padded: int | None,
    said: Callable[[str], None],
) -> dict[str, Any]:
    base = baseline(padded)
    with Engine(model, LLMOPT) as engine:
        ways: dict[str, Callable[[], Done]] = {
            base: partial(stock, model, padded or 1, requests),
            BATCHED: partial(batched, model, requests),
            OURS: partial(ours, engine, requests),
        }
        refused = None
        for name in list(ways):  # sets every way up
            try:
                ways[name]()
            except Exception as error:
                if name != BATCHED:
                    raise
                refused = f"{type(error).__name__}: {error}"  # stock's own batching has demands of its own
                del ways[name]
            said(name)
        runs = interleave(ways, repeats, said)
    expected = runs[base][0].tokens
    equality = {name: _equality(model, requests, expected, found) for name, found in runs.items()}
    reasons = [] if equality[OURS]["same"] else [f"llmopt gave other tokens than {base}"]
    total = sum(job.new for job in requests)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    pairs = [(OURS, base), (OURS, BATCHED)]
    return {
        **asdict(load),
        "prompt_tokens": sum(len(job.prompt) for job in requests),
        "new_tokens": total,
        "ways": {
            name: {"seconds": summary(found), "tokens_per_second": summary(total / s for s in found)}
            for name, found in seconds.items()
        },
        "equality": equality,
        "refused": refused,
        "reasons": reasons,
        "passed": not reasons,
        # Nothing is said about speed unless the tokens are the same.
        "ratios": []
        if reasons
        else [
            {"way": way, "over": over, **asdict(paired_ratio(seconds[over], seconds[way]))}
            for way, over in pairs
            if over in seconds
        ],
    }


def _equality(
    model: PreTrainedModel, requests: Sequence[Job], expected: list[list[int]], runs: Sequence[Done]
) -> dict[str, Any]:
    """How many requests got the tokens of stock in every run; below float32 up to near ties."""
    identical, same = 0, 0
    for number, job in enumerate(requests):
        others = {tuple(run.tokens[number]) for run in runs} - {tuple(expected[number])}
        identical += not others
        same += all(compare_answers(model, job.prompt, expected[number], list(other)).same for other in others)
    return {"same": same == len(requests), "identical": identical, "requests": len(requests)}


# --------------------------------------------------------------------------------------------------------------- rates


def _sweep(
    model: PreTrainedModel,
    requests: list[Job],
    capacity: float,
    seed: int,
    limits: Limits,
    said: Callable[[str], None],
) -> dict[str, Any]:
    """Requests that come at random, at rates up to beyond what can be served."""
    points = []
    with Engine(model, LLMOPT) as engine:
        expected = ours(engine, requests).tokens
        for share in SHARES:
            gaps = np.random.default_rng([seed, 1]).exponential(1 / (share * capacity), size=len(requests))
            points.append({"load": share, **_rate(engine, requests, gaps.tolist(), expected, limits)})
            said(f"{share:g} of capacity")
    return {
        "capacity": capacity,
        "limits": asdict(limits),
        "points": points,
        "passed": all(point["same"] for point in points),
    }


def _rate(
    engine: Engine, requests: list[Job], gaps: list[float], expected: list[list[int]], limits: Limits
) -> dict[str, Any]:
    times: list[list[float]] = [[] for _ in requests]
    arrived = [0.0] * len(requests)
    tokens: list[list[int]] = [[] for _ in requests]

    def read(number: int, handle: Any) -> None:
        for token in handle:
            times[number].append(perf_counter())
            tokens[number].append(token)

    began, due, readers = perf_counter(), 0.0, []
    for number, (job, gap) in enumerate(zip(requests, gaps, strict=True)):
        due += gap
        sleep(max(0.0, began + due - perf_counter()))
        arrived[number] = perf_counter()
        reader = Thread(target=read, args=(number, engine.submit(job.prompt, **arguments(job))), daemon=True)
        reader.start()
        readers.append(reader)
    for reader in readers:
        reader.join()
    seconds = max(found[-1] for found in times) - began
    first = [found[0] - at for found, at in zip(times, arrived, strict=True)]
    each = [(found[-1] - found[0]) / max(1, len(found) - 1) for found in times]
    good = sum(f <= limits.first and e <= limits.each for f, e in zip(first, each, strict=True))
    return {
        "requests_per_second": len(requests) / due,
        "first_token": {f"p{q}": float(np.percentile(first, q)) for q in (50, 99)},
        "per_token": {f"p{q}": float(np.percentile(each, q)) for q in (50, 99)},
        "tokens_per_second": sum(map(len, tokens)) / seconds,
        "goodput": good / seconds,
        "same": _equality(engine.model, requests, expected, [Done(seconds, tokens)])["same"],
    }


# ------------------------------------------------------------------------------------------------------------ timeline


def timeline(model: PreTrainedModel, requests: Sequence[Job]) -> dict[str, Any]:
    """Record a real schedule: requests that come in three waves, over pages for about half of them.

    Returns:
        `requests`, each with its prompt length, and `steps`, each with its time, the spans `[request, first token,
        tokens]` it computed and the requests that lost their pages.
    """
    size = 8
    pages = [-(-(len(job.prompt) + job.new) // size) for job in requests]
    config = {
        "kv_cache": {"page_size": size, "max_tokens": size * max(max(pages), sum(pages) // 3)},
        "batching": {"continuous": True, "max_batch_tokens": max(32, max(len(job.prompt) for job in requests) // 2)},
    }
    steps: list[dict[str, Any]] = []
    numbers: dict[Any, int] = {}
    with Engine(model, config) as engine:

        def record(plan: Plan, began: float) -> None:
            steps.append(
                {
                    "began": began,
                    "ended": perf_counter(),
                    "spans": [[numbers[r], r.computed - length, length] for r, length in plan.spans if r in numbers],
                    "preempted": [numbers[r] for r in plan.preempted if r in numbers],
                }
            )

        engine.loop.on_step = record
        arrived: list[float] = []
        handles: list[RequestHandle] = []
        wave = max(1, len(requests) // 3)
        for number, job in enumerate(requests):
            if number and number % wave == 0:
                while len(steps) < number // wave * 8 and not all(handle.done for handle in handles):
                    sleep(0.001)
            with engine.loop.lock:  # so that the first step already knows its number
                handle = engine.submit(job.prompt, **arguments(job))
                numbers[handle._row.request] = number
            arrived.append(perf_counter())
            handles.append(handle)
        for handle in handles:
            handle.result()
        engine.loop.on_step = None
    start = arrived[0]
    for step in steps:
        step["began"], step["ended"] = step["began"] - start, step["ended"] - start
    return {
        "requests": [
            {"prompt": len(job.prompt), "new": job.new, "arrived": at - start}
            for job, at in zip(requests, arrived, strict=True)
        ],
        "steps": steps,
    }
