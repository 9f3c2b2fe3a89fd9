"""Part 6: many requests of different lengths, against stock's `generate` and stock's own continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from threading import Thread
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_llmopt import Engine, RequestHandle
from hf_llmopt.engine.scheduler import Plan
from hf_llmopt.kernels import cpu

from .equality import compare
from .kv_cache import describe
from .measure import Ratio, environment, interleave, paired_ratio, summary
from .report import Table

ONE_BY_ONE, BATCHED, OURS = "stock, one by one", "stock generate_batch", "llmopt"
LLMOPT = "continuous_batching"
# Stock's name for a page: `block_size` until transformers 5.17.
_BLOCK = next(name for name in ("page_size", "block_size") if hasattr(ContinuousBatchingConfig, name))
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25)  # request rates of the sweep, as shares of what the engine can serve at most
OnRun = Callable[[str, str], None]


@dataclass(frozen=True)
class Load:
    """A set of requests.

    Attributes:
        name: Says it in a table.
        requests: How many.
        prompts: Shortest and longest prompt, in tokens.
        new: Fewest and most new tokens.
        mean: Mean prompt and mean new tokens if lengths are log-normal, as those of people's chats are; else `None`,
            and they are uniform.
    """

    name: str
    requests: int
    prompts: tuple[int, int]
    new: tuple[int, int]
    mean: tuple[int, int] | None = None


LOADS_BY_NAME = {
    load.name: load
    for load in (
        Load("random-256", 256, (16, 128), (16, 128)),
        Load("ragged-16", 16, (32, 256), (32, 32)),
        # Means of the ShareGPT conversations as the vLLM paper gives them (arXiv:2309.06180, section 6.1).
        Load("sharegpt", 64, (4, 512), (4, 512), mean=(161, 338)),
        Load("nano-vllm", 256, (100, 1024), (100, 1024)),  # the benchmark of nano-vllm's README
    )
}
DEFAULT = ("random-256", "ragged-16", "sharegpt")
QUICK = (Load("random-8", 8, (4, 12), (2, 8)), Load("sharegpt", 4, (4, 16), (2, 8), mean=(8, 5)))


@dataclass(frozen=True)
class Job:
    """One request: prompt ids, and how many tokens to generate."""

    prompt: list[int]
    new: int


@dataclass(frozen=True)
class Done:
    """A run over all jobs: the seconds it took and the new tokens of each."""

    seconds: float
    tokens: list[list[int]]


@dataclass(frozen=True)
class Limits:
    """What a user accepts: seconds to the first token, and seconds per token after it."""

    first: float = 1.0
    each: float = 0.1


def jobs(load: Load, vocabulary: int, texts: Sequence[list[int]] | None = None, seed: int = 0) -> list[Job]:
    """Draw the requests of a load.

    Args:
        load: How many, and how long.
        vocabulary: Token ids of the model: 0 to `vocabulary - 1`.
        texts: Tokenized texts to cut prompts from; random ids if `None`.
        seed: Chooses lengths and places.

    Example:
        >>> [(len(job.prompt), job.new) for job in jobs(Load("two", 2, (3, 9), (1, 5)), vocabulary=50)]
        [(9, 2), (3, 3)]
    """
    rng = np.random.default_rng([seed, load.requests])
    lengths = [_lengths(rng, load, column) for column in (0, 1)]
    text = None if texts is None else [token for one in texts for token in one]
    drawn = []
    for length, new in zip(*lengths, strict=True):
        if text is None:
            prompt = rng.integers(0, vocabulary, size=length).tolist()
        else:
            start = int(rng.integers(len(text) - length + 1))
            prompt = text[start : start + length]
        drawn.append(Job(prompt, new))
    return drawn


def _lengths(rng: np.random.Generator, load: Load, column: int) -> list[int]:
    low, high = (load.prompts, load.new)[column]
    if load.mean is None:
        return list(map(int, rng.integers(low, high + 1, size=load.requests)))
    sigma = 1.0
    drawn = rng.lognormal(np.log(load.mean[column]) - sigma**2 / 2, sigma, size=load.requests)
    return list(map(int, drawn.clip(low, high)))


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
    return len(loads) * 3 * (repeats + 1) + len(LOADS)


# ---------------------------------------------------------------------------------------------------------- throughput


def baseline(padded: int | None) -> str:
    """What the way that the others are compared with is called."""
    return ONE_BY_ONE if padded is None else f"stock, padded batches of {padded}"


def stock(model: PreTrainedModel, rows: int, requests: Sequence[Job]) -> Done:
    """A loop of stock `generate` over batches of `rows` requests, padded on the left."""
    tokens = []
    began = perf_counter()
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
        width = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in batch])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        longest = max(batch, key=lambda job: job.new)
        output = model.generate(  # type: ignore[operator]
            ids.to(model.device), attention_mask=mask.to(model.device), llmopt=False, **_arguments(longest)
        )
        tokens += [row[width:][: job.new] for row, job in zip(output.tolist(), batch, strict=True)]
    return Done(perf_counter() - began, tokens)


def batched(model: PreTrainedModel, requests: Sequence[Job]) -> Done:
    """Stock's own continuous batching; its attention implementation is put back.

    On a GPU it chooses its own settings, CUDA graphs among them. On the CPU it cannot: it gets room for all requests.
    """
    former, size = model.config._attn_implementation, 32
    blocks = sum(-(-(len(job.prompt) + job.new) // size) + 1 for job in requests)
    room: dict[str, Any] = {_BLOCK: size, "num_blocks": blocks + 2, "max_batch_tokens": 512}
    batching = ContinuousBatchingConfig(**(room if model.device.type == "cpu" else {}))
    config = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found: dict[str, list[int]] = {}
    cpu.rest()  # it has a thread of its own, which this one's OpenMP threads would slow down
    began = perf_counter()
    try:
        with model.continuous_batching_context_manager(config, continuous_batching_config=batching) as manager:  # type: ignore[operator]
            for number, job in enumerate(requests):
                manager.add_request(job.prompt, request_id=str(number), max_new_tokens=job.new)
            while len(found) < len(requests):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    found[output.request_id] = list(output.generated_tokens)
                elif output is None and not manager.is_running():
                    raise RuntimeError("stock's continuous batching stopped")
    finally:
        seconds = perf_counter() - began
        if model.config._attn_implementation != former:
            model.set_attn_implementation(former)
    return Done(seconds, [found[str(number)] for number in range(len(requests))])


def ours(engine: Engine, requests: Sequence[Job]) -> Done:
    """Submitted to an engine, all at once."""
    began = perf_counter()
    handles = [engine.submit(job.prompt, **_arguments(job)) for job in requests]
    tokens = [handle.result() for handle in handles]
    return Done(perf_counter() - began, tokens)


def _arguments(job: Job) -> dict[str, Any]:
    return {"max_new_tokens": job.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


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
        same += all(_near_tie(model, job, expected[number], list(other)) for other in others)
    return {"same": same == len(requests), "identical": identical, "requests": len(requests)}


def _near_tie(model: PreTrainedModel, job: Job, expected: list[int], got: list[int]) -> bool:
    prompt = torch.tensor([job.prompt], device=model.device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    rows = [torch.tensor([job.prompt + tokens]) for tokens in (expected, got)]
    return compare(model, inputs, *rows).same


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
        for share in LOADS:
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
        reader = Thread(target=read, args=(number, engine.submit(job.prompt, **_arguments(job))), daemon=True)
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
                handle = engine.submit(job.prompt, **_arguments(job))
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


def svg(recorded: Mapping[str, Any], width: int = 900) -> str:
    """Draw a recorded schedule: a line for each request, a bar for each span, time from left to right.

    Args:
        recorded: As `timeline` returned it, or as read back from JSON.
        width: Of the picture, in pixels.
    """
    left, top, height = 60, 44, 18
    requests, steps = recorded["requests"], recorded["steps"]
    end = max(step["ended"] for step in steps)
    bottom = top + height * len(requests)

    def x(seconds: float) -> float:
        return left + (width - left - 10) * max(0.0, seconds) / end

    colors = {"prompt": "#1f77b4", "token": "#9ecae1", "wait": "#bbbbbb", "lost": "#d62728"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 30}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{bottom + 30}" fill="white"/>',
    ]
    for place, (color, name) in enumerate(
        [("prompt", "prompt"), ("token", "new token"), ("wait", "waits"), ("lost", "loses its pages")]
    ):
        parts.append(f'<rect x="{left + 150 * place}" y="12" width="12" height="12" fill="{colors[color]}"/>')
        parts.append(f'<text x="{left + 150 * place + 18}" y="22">{name}</text>')
    for number, request in enumerate(requests):
        y = top + height * number
        last = max((step["ended"] for step in steps if any(s[0] == number for s in step["spans"])), default=end)
        parts.append(f'<text x="4" y="{y + 12}">{number + 1}: {request["prompt"]}+{request["new"]}</text>')
        parts.append(
            f'<line x1="{x(request["arrived"]):.1f}" x2="{x(last):.1f}" y1="{y + 8}" y2="{y + 8}" '
            f'stroke="{colors["wait"]}"/>'
        )
    for step in steps:
        begin, size = x(step["began"]), max(0.5, x(step["ended"]) - x(step["began"]) - 0.3)
        for number, first, length in step["spans"]:
            kind = "prompt" if first + length <= requests[number]["prompt"] or length > 1 else "token"
            parts.append(
                f'<rect x="{begin:.1f}" y="{top + height * number + 2}" width="{size:.1f}" height="{height - 6}" '
                f'fill="{colors[kind]}"/>'
            )
        for number in step["preempted"]:
            parts.append(
                f'<rect x="{begin - 1:.1f}" y="{top + height * number}" width="2" height="{height - 2}" '
                f'fill="{colors["lost"]}"/>'
            )
    parts.append(f'<text x="{left}" y="{bottom + 18}">0 s</text>')
    parts.append(f'<text x="{width - 10}" y="{bottom + 18}" text-anchor="end">{end:.2f} s</text>')
    return "\n".join([*parts, "</svg>", ""])


# -------------------------------------------------------------------------------------------------------------- tables


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report: throughput, and latencies at several rates."""
    model, machine = report["model"], report["environment"]
    caption = (
        f"{machine['hardware']}; torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}; greedy; prompts: {report['prompts']}; medians of {report['repeats']} "
        "interleaved runs; × is the geometric mean of paired ratios with its 95 % interval"
    )
    title = f"{model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}"
    made = [
        Table(
            f"continuous_batching: {title}",
            ["load", "way", "requests", "new tokens", "seconds", "tokens/s", "same tokens", "llmopt ×"],
            [row for load in report["loads"] for row in _rows(load)],
            2,
            caption,
        )
    ]
    if report["rates"] is not None:
        made.append(_rates_table(report["rates"]))
    return made


def _rows(load: Mapping[str, Any]) -> list[list[str]]:
    ratios = {ratio["over"]: ratio for ratio in load["ratios"]}
    rows = []
    for name, way in load["ways"].items():
        outcome, ratio = load["equality"][name], ratios.get(name)
        times = str(Ratio(ratio["ratio"], ratio["low"], ratio["high"])) if ratio else ""
        rows.append(
            [
                load["name"],
                name,
                str(load["requests"]),
                str(load["new_tokens"]),
                f"{way['seconds']['median']:.2f}",
                f"{way['tokens_per_second']['median']:.1f}",
                f"{outcome['identical']} of {outcome['requests']}" + ("" if outcome["same"] else ", NOT the same"),
                times if load["passed"] else "FAILED",
            ]
        )
    return rows


def _rates_table(rates: Mapping[str, Any]) -> Table:
    limits = rates["limits"]
    rows = [
        [
            f"{point['load']:g}",
            f"{point['requests_per_second']:.2f}",
            f"{point['goodput']:.2f}",
            *(f"{1e3 * point['first_token'][q]:.0f}" for q in ("p50", "p99")),
            *(f"{1e3 * point['per_token'][q]:.1f}" for q in ("p50", "p99")),
            f"{point['tokens_per_second']:.1f}",
        ]
        for point in rates["points"]
    ]
    caption = (
        f"requests come at random (Poisson) at a share of the {rates['capacity']:.2f} requests/s that are served when "
        f"all come at once; good: first token within {limits['first']:g} s, then {limits['each']:g} s a token or less"
    )
    columns = ["load", "requests/s", "good/s", "first ms p50", "p99", "ms/token p50", "p99", "tokens/s"]
    return Table("continuous_batching: request rates", columns, rows, 1, caption)


def failures(report: Mapping[str, Any]) -> list[str]:
    """Why the report did not pass, a line for each reason."""
    lines = [f"{load['name']}: {reason}" for load in report["loads"] for reason in load["reasons"]]
    if report["rates"] is not None and not report["rates"]["passed"]:
        lines.append("rates: requests that came one after the other got other tokens")
    return lines


def in_miniature(load: Load, limit: int) -> Load:
    """The same load, its lengths bounded so that prompt and new tokens stay within `limit` positions."""
    half = limit // 2
    return replace(
        load,
        prompts=(min(load.prompts[0], half), min(load.prompts[1], half)),
        new=(min(load.new[0], half), min(load.new[1], half)),
    )
