"""The C kernels on the CPU against stock: steps of decoding, throughput, distance to the memory's bandwidth, shares."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_llmopt import Engine
from hf_llmopt.kernels import cpu

from .breakdown import PARTS, Marks, instrumented
from .equality import Equality, rounding_noise, worst
from .kv_cache import describe
from .measure import Run, environment, generate, interleave, paired_ratio, summary
from .report import Table
from .workloads import Workload, build, held_out_ids, ragged_prompts

STOCK, OURS, BATCHED = "stock", "llmopt", "stock generate_batch"
LLMOPT = "kv_cache"  # the kernels serve every part; prompts are computed anew in every run
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


def failures(report: dict[str, Any]) -> list[str]:
    """Why the report did not pass, a line for each reason."""
    return [
        f"{result['name']}, {case['name']}: {reason}"
        for result in report["experiments"]
        for case in result["cases"]
        for reason in case["reasons"]
    ]


def _model(experiment: Experiment, seed: int, quick: bool) -> tuple[PreTrainedModel, list[list[int]] | None]:
    if experiment.shape != "demo":
        return build(experiment.shape, getattr(torch, experiment.dtype), seed, miniature=quick), None
    from hf_llmopt import demo

    model, tokenizer = demo.load()
    return model.to("cpu"), held_out_ids(tokenizer)  # type: ignore[arg-type]


def _inputs(model: PreTrainedModel, workload: Workload, texts: list[list[int]] | None, seed: int) -> dict[str, Tensor]:
    embeddings: Any = model.get_input_embeddings()
    return ragged_prompts(workload, embeddings.weight.shape[0], texts, seed)


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
    stock, ours = runs[STOCK], runs[OURS]
    return {
        "name": workload.name,
        "rows": workload.rows,
        "new_tokens": workload.new_tokens,
        "prompt_lengths": inputs["attention_mask"].sum(1).tolist(),
        "ways": {name: _figures(runs[name]) for name in (STOCK, OURS)},
        "equality": outcome.to_dict(),
        "reasons": reasons,
        "goal": goal,
        "ratio": None if reasons else _ratio([r.ms_per_step for r in stock], [r.ms_per_step for r in ours]),
        "whole_call": None if reasons else _ratio([r.seconds for r in stock], [r.seconds for r in ours]),
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


def _ratio(baseline: Sequence[float], way: Sequence[float]) -> dict[str, Any]:
    found = paired_ratio(baseline, way)
    return {"ratio": found.ratio, "low": found.low, "high": found.high}


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
            "ratio": None if reasons else _ratio(times[last.name], times[first.name]),
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
            "ratio": None if result["reasons"] else _ratio(times, floors),
        }
        results.append(result)
    return results


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step of a single row reads; an embedding that is no head does not count."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    unread = None if head is not None and head.weight is embeddings.weight else embeddings.weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not unread)


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
        arguments = _arguments(workload)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
        with Engine(model, LLMOPT) as engine:

            def submit(engine: Engine = engine, prompts: Any = prompts, arguments: Any = arguments) -> _Timed:
                began = perf_counter()
                handles = [engine.submit(prompt, **arguments) for prompt in prompts]
                tokens = [handle.result() for handle in handles]
                reasons = {h.stats.reason or "" for h in handles if h.stats.served_by != "llmopt"}
                return _Timed(perf_counter() - began, tokens, sorted(reasons))

            def padded(inputs: Any = inputs, arguments: Any = arguments) -> _Timed:
                run = generate(model, inputs, **arguments)
                return _Timed(run.seconds, run.output[:, run.prompt_length :].tolist(), [])

            ways: dict[str, Callable[[], _Timed]] = {STOCK: padded, OURS: submit}
            refused = None
            try:
                generate_batch(model, prompts, workload.new_tokens)
                ways[BATCHED] = partial(generate_batch, model, prompts, workload.new_tokens)
            except Exception as error:  # stock's own batching has demands of its own
                refused = f"{type(error).__name__}: {error}"
            submit()
            padded()
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
        reasons += [f"transformers served the call: {r}" for r in {r for run in runs[OURS] for r in run.reasons}]
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
                "ratios": {n: _ratio(seconds[STOCK], t) for n, t in seconds.items() if n != STOCK and not reasons},
            }
        )
    return results


@dataclass(frozen=True)
class _Timed:
    seconds: float
    tokens: list[list[int]]
    reasons: list[str]


def generate_batch(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> _Timed:
    """Stock's continuous batching, with twice the blocks that the requests need: by default it takes all memory.

    The attention implementation that it leaves behind is put back.
    """
    former = model.config._attn_implementation
    size = 32
    blocks = sum(-(-(len(prompt) + new_tokens) // size) for prompt in prompts)
    batching = ContinuousBatchingConfig(page_size=size, num_blocks=2 * blocks + 2, max_batch_tokens=512)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    began = perf_counter()
    try:
        found = model.generate_batch(prompts, config, batching)  # type: ignore[operator]
    finally:
        seconds = perf_counter() - began
        if model.config._attn_implementation != former:
            model.set_attn_implementation(former)
    by_prompt = [(list(output.prompt_ids), list(output.generated_tokens)) for output in found.values()]
    if len(by_prompt) != len(prompts):
        raise RuntimeError(f"{len(by_prompt)} of {len(prompts)} requests came back")
    tokens = []
    for prompt in prompts:
        place = next(i for i, (ids, _) in enumerate(by_prompt) if ids == prompt)
        tokens.append(by_prompt.pop(place)[1])
    return _Timed(seconds, tokens, [])


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


def _met(case: dict[str, Any]) -> bool:
    """Whether a case reaches its goal, by the median of its runs."""
    if "ratio" not in case:
        return bool(case["ways"][OURS]["tokens_per_second"]["median"] >= case["goal"])
    ratio: float = case["ratio"]["ratio"]
    return ratio <= case["goal"] if "at_most" in case else ratio >= case["goal"]


# -------------------------------------------------------------------------------------------------------------- tables


def tables(report: dict[str, Any]) -> list[Table]:
    """The tables of a report, one for each kind of measurement that it holds."""
    made = [
        _steps_table([r for r in report["experiments"] if r["kind"] in ("decode", "growth", "floor")]),
        _throughput_table([r for r in report["experiments"] if r["kind"] == "throughput"]),
        _breakdown_table([r for r in report["experiments"] if r["kind"] == "breakdown"]),
    ]
    found = [table for table in made if table.rows]
    if found:
        machine = report["environment"]
        caption = (
            f"{machine['hardware']}, {machine['threads']} threads; kernels: {report['kernels']}; torch "
            f"{machine['versions']['torch']}, transformers {machine['versions']['transformers']}; greedy, random "
            f"weights but for the embedded model; medians of {report['repeats']} interleaved runs; × is the geometric "
            "mean of paired ratios with its 95 % interval; noise: how far stock's own logits move by rounding"
        )
        if report["quick"]:
            caption = "miniature models and prompts: no figure counts; " + caption
        found[-1] = replace(found[-1], caption="; ".join(filter(None, [found[-1].caption, caption])))
    return found


def _steps_table(results: Sequence[dict[str, Any]]) -> Table:
    columns = ["experiment", "case", "baseline ms/step", "llmopt ms/step", "×", "goal", "whole call ×", "same tokens"]
    rows = []
    for result in results:
        for case in result["cases"]:
            baseline, ours = case["ways"].values()  # stock and llmopt, or two contexts of llmopt
            name, first = case["name"], case.get("floor_ms", baseline["ms_per_step"])
            if "bytes_per_second" in case:
                name += f", {case['bytes_per_second']['median'] / 1e9:.1f} GB/s"
            rows.append(
                [
                    f"{result['name']} ({result['model']['dtype']})",
                    name,
                    f"{first['median']:.2f}",
                    f"{ours['ms_per_step']['median']:.2f}",
                    "FAILED" if case["reasons"] else _times(case["ratio"]),
                    _goal(case, "×"),
                    _times(case.get("whole_call")),
                    _same(case["equality"], result["noise"]),
                ]
            )
    caption = (
        "baseline: stock; of long-context, llmopt at the short one; of floor, reading all weights once (× is how many "
        "times as long a step takes)"
    )
    return Table("cpu: steps of decoding", columns, rows, 2, caption)


def _throughput_table(results: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for result in results:
        for case in result["cases"]:
            for name, way in case["ways"].items():
                equality = case["equality"].get(name)
                rows.append(
                    [
                        case["name"], name, f"{way['tokens_per_second']['median']:.1f}",
                        _times(case["ratios"].get(name)), _goal(case, "") if name == OURS else "",
                        _same(equality, result["noise"]) if equality else "NO",
                    ]
                )  # fmt: skip
            if case["refused"]:
                rows.append([case["name"], BATCHED, "did not run", "", "", ""])
    return Table("cpu: throughput", ["case", "way", "tokens/s", "× stock", "goal", "same tokens"], rows)


def _breakdown_table(results: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [case["name"], f"{case['ms_per_step']:.2f}", f"{case['ms_per_step_without_clocks']:.2f}"]
        + [f"{case['ms'][part]:.2f} ({100 * case['ms'][part] / case['ms_per_step']:.0f} %)" for part in PARTS]
        for result in results
        for case in result["cases"]
    ]
    return Table("cpu: where a step goes, ms", ["case", "ms/step", "without clocks", *PARTS], rows, 1)


def _times(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    low, high = ratio["low"], ratio["high"]
    return f"{ratio['ratio']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


def _goal(case: dict[str, Any], unit: str) -> str:
    if case["goal"] is None:
        return ""
    verdict = "" if case["met"] is None else ": met" if case["met"] else ": missed"
    return f"{'≤' if 'at_most' in case else '≥'} {case['goal']:g}{unit}{verdict}"


def _same(equality: dict[str, Any], noise: float) -> str:
    """The verdict; below float32 with the rounding noise, and the widest gap that it had to cover."""
    verdict = "yes" if equality["identical"] else "up to near ties" if equality["same"] else "NO"
    gaps = [d["gap"] for d in equality["differences"] if d["gap"] is not None]
    if not noise and not gaps:
        return verdict
    noise = min([noise, *(d["noise"] for d in equality["differences"] if d["noise"] is not None)])
    return f"{verdict} ({f'gap {max(gaps):.3f}, ' if gaps else ''}noise {noise:.3f})"
