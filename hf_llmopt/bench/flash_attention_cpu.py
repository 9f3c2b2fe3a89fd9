"""Attention on the CPU: our C kernels over pages against torch's on dense keys, memory of a prompt, long decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from ..kernels import cpu
from .cpu_kinds import read_bandwidth
from .equality import worst
from .flash_attention import OnRun, Problem, problem
from .load_memory import watching
from .measure import Run, environment, generate, interleave, paired_ratio, summary, weight_bytes
from .report import Table, machine_text, ratio_text, same_text
from .workloads import build

STOCK, OURS = "torch", "llmopt"
PARTS = ("prompts", "memory", "decode")
GOAL = 5.0  # times as fast as stock, decoding at 16k
LINEAR = 1.25  # most that a token's share of the peak may grow while the prompt does
NOISE = 2**26  # bytes that an allocator may keep or not


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        heads: Query heads, key heads, width; of each kind of prompt.
        spans: Tokens of a request, and how many of them are computed.
        lengths: Tokens of the prompts whose memory is taken.
        context: Tokens before the first one that is decoded.
        new_tokens: How many are decoded.
        miniature: Of the models.
    """

    heads: tuple[tuple[int, int, int], ...] = ((14, 2, 64), (8, 2, 128))  # of 0.5b; a quarter of 8b-llama
    spans: tuple[tuple[int, int], ...] = (
        (512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (8192, 512),
    )  # fmt: skip
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    context: int = 16384
    new_tokens: int = 17
    miniature: bool = False


QUICK = Size(((4, 2, 16),), ((64, 64), (128, 32)), (256, 512), 64, 5, True)


def steps(parts: Sequence[str], size: Size) -> int:
    """How often `on_run` is called."""
    per_part = {"prompts": 2 * len(size.heads) * len(size.spans), "memory": len(size.lengths), "decode": 2}
    return sum(per_part[part] for part in parts)


def bench(
    parts: Sequence[str] = PARTS, size: Size | None = None, repeats: int = 5, seed: int = 0, on_run: OnRun = print
) -> dict[str, Any]:
    """Measure ours and torch's way in turns, with the error of both, or the tokens, of the same run.

    Args:
        parts: Of `PARTS`.
        size: How much.
        repeats: Rounds.
        seed: Of all numbers.
        on_run: Called before each measurement.

    Returns:
        The report, ready for JSON.
    """
    size = size or Size()
    report: dict[str, Any] = {"bench": "flash attention on a CPU", "environment": environment(), "repeats": repeats}
    report |= {"quick": size.miniature, "kernels": cpu.used() if cpu.available() else cpu.why_not()}
    if "prompts" in parts:
        generator = torch.Generator("cpu").manual_seed(seed)
        report["prompts"] = []
        for dtype in (torch.bfloat16, torch.float32):
            for heads in size.heads:
                for context, span in size.spans:
                    on_run(f"{str(dtype)[6:]}, heads {heads}, {span} of {context} tokens")
                    case = problem(1, context, span, generator, False, heads, dtype)
                    report["prompts"].append(_prompt(case, heads, repeats))
    if "memory" in parts:
        report["memory"] = []
        for length in size.lengths:
            on_run(f"memory of {length} tokens")
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found = pool.submit(peak, length, size.miniature, seed).result()
            report["memory"].append({"tokens": length, "bytes": found})
    if "decode" in parts:
        report["decode"] = _decode(size, repeats, seed, on_run)
    report["passed"] = not failures(report)
    return report


@torch.no_grad()
def _prompt(case: Problem, heads: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    query, keys, values = (part.contiguous() for part in case.dense())
    causal = case.span == case.context
    index = torch.arange(case.context)
    mask = None if causal else index <= index[-case.span :, None]

    def torchs() -> Tensor:
        output = scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)

    def seconds(way: Callable[[], Tensor]) -> float:
        began = perf_counter()
        way()
        return perf_counter() - began

    ways: dict[str, Callable[[], Tensor]] = {STOCK: torchs, OURS: partial(cpu.attention, case.query, case.seen)}
    errors = {name: case.error(way()) for name, way in ways.items()}
    times = interleave({name: partial(seconds, way) for name, way in ways.items()}, repeats)
    ratio = paired_ratio(times[STOCK], times[OURS])
    found: dict[str, Any] = {"dtype": str(case.query.dtype)[6:], "heads": heads}
    found |= {"context": case.context, "span": case.span, "error": errors}
    found["milliseconds"] = {name: summary(1e3 * second for second in found) for name, found in times.items()}
    found["ratio"] = {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
    return found


def peak(tokens: int, miniature: bool, seed: int) -> int | None:
    """Bytes by which this process's own memory rises while a prompt is computed; `None` where that cannot be seen.

    The model has two layers of the shape 0.5b: memory that layers share counts once, pages and caches count twice.

    Args:
        tokens: Of the prompt.
        miniature: A smaller model.
        seed: Of weights and prompt.
    """
    import hf_llmopt

    hf_llmopt.install()
    model = build("0.5b", torch.bfloat16, seed, miniature)
    if not miniature:
        del model.model.layers[2:]
        model.config.num_hidden_layers, model.config.layer_types = 2, model.config.layer_types[:2]
    prompt = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(prompt), "llmopt": "kv_cache"}
    short = prompt[:, :64]
    model.generate(short, **{**options, "attention_mask": torch.ones_like(short)})  # type: ignore[operator]
    with watching() as risen:
        model.generate(prompt, **options)  # type: ignore[operator]
        return risen()[0]


def _decode(size: Size, repeats: int, seed: int, on_run: OnRun) -> dict[str, Any]:
    """Steps behind a long prompt through `generate`; stock goes on from a copy of the keys that our pages hold."""
    model = build("0.5b", torch.bfloat16, seed, size.miniature)
    ids = torch.randint(model.config.vocab_size, (1, size.context + 1), generator=torch.Generator().manual_seed(seed))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    llmopt = {"kv_cache": True, "prompt_cache": True}
    on_run(f"decode at {size.context}: prompt")
    began = perf_counter()
    once = {"max_new_tokens": 1, "return_dict_in_generate": True, "llmopt": llmopt}
    pages = model.generate(**inputs, **options, **once).past_key_values  # type: ignore[operator]
    prompt = perf_counter() - began
    options["max_new_tokens"] = size.new_tokens

    def stock() -> Run:
        cache = DynamicCache(config=model.config)
        for layer in range(len(pages)):
            cache.update(*(part[:, :, : size.context] for part in pages.dense(layer)), layer)
        return generate(model, inputs, past_key_values=cache, **options)

    on_run(f"decode at {size.context}: steps")
    ways: dict[str, Callable[[], Run]] = {
        STOCK: stock,
        OURS: lambda: generate(model, inputs, llmopt=llmopt, **options),
    }
    runs = interleave(ways, repeats)
    outcome = worst(model, inputs, runs[STOCK][0].output, [run.output for run in runs[OURS]])
    reasons = [] if outcome.same else ["other tokens than stock"]
    stats = [run.stats for run in runs[OURS] if run.stats is not None]
    reasons += sorted({f"transformers served the call: {s.reason}" for s in stats if s.served_by != "llmopt"})
    if any("cpu" not in s.attention for s in stats):
        reasons.append("the attention kernel did not run")
    read = weight_bytes(model) + sum(part.nbytes for layer in range(len(pages)) for part in pages.dense(layer))
    rate = read_bandwidth(torch.ones(2**17 if size.miniature else 2**27, dtype=torch.int64))
    times = {name: [run.ms_per_step for run in found] for name, found in runs.items()}
    ratio = paired_ratio(times[STOCK], times[OURS])
    return {
        "shape": "0.5b, bfloat16" + ", in miniature" * size.miniature,
        "context": size.context,
        "new_tokens": size.new_tokens,
        "prompt_seconds": prompt,
        "ms_per_step": {name: summary(found) for name, found in times.items()},
        "read_bytes": read,
        "bytes_per_second": rate,
        "equality": outcome.to_dict(),
        "reasons": reasons,
        "goal": GOAL,
        "ratio": None if reasons else {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high},
    }


def failures(report: dict[str, Any]) -> list[str]:
    """Errors larger than torch's, memory that grows faster than the prompt, other tokens: a line for each."""
    lines = []
    for found in report.get("prompts", ()):
        ours, theirs = found["error"][OURS], found["error"][STOCK]
        if ours > 1.1 * theirs:
            lines.append(f"{_case(found)}: error {ours:.2e}, torch's {theirs:.2e}")
    known = [(found["tokens"], found["bytes"]) for found in report.get("memory", ()) if found["bytes"]]
    for (tokens, before), (more, after) in pairwise(known):
        if after / more > LINEAR * max(before, NOISE) / tokens:
            lines.append(f"memory: {before:,} bytes for {tokens:,} tokens, {after:,} for {more:,}")
    if "decode" in report:
        lines += [f"decode: {reason}" for reason in report["decode"]["reasons"]]
    return lines


def _case(found: dict[str, Any]) -> str:
    return f"{found['dtype']}, heads {tuple(found['heads'])}, {found['span']} of {found['context']} tokens"


def _milliseconds(figure: float) -> str:
    """One place behind the point; below 1, as miniatures take, two digits that say something."""
    return f"{figure:.1f}" if figure >= 1 else f"{figure:.2g}"


def tables(report: dict[str, Any]) -> list[Table]:
    """A table for each part that was measured."""
    machine = machine_text(report["environment"])
    rounds = f"medians of {report['repeats']} interleaved rounds; "
    rounds += "× is the geometric mean of paired ratios with its 95 % interval"
    found = []
    if "prompts" in report:
        rows = []
        for case in report["prompts"]:
            heads, kv_heads, width = case["heads"]
            rows.append([case["dtype"], f"{heads} / {kv_heads}, {width}", f"{case['context']:,}", f"{case['span']:,}"])
            rows[-1] += [_milliseconds(case["milliseconds"][name]["median"]) for name in (STOCK, OURS)]
            rows[-1] += [ratio_text(case["ratio"])] + [f"{case['error'][name]:.1e}" for name in (STOCK, OURS)]
        columns = ["numbers", "heads, width", "context", "computed", "torch ms", "llmopt ms", "× torch"]
        columns += ["torch's error", "llmopt's error"]
        caption = (
            f"{machine}; ours over pages in random order, torch's over contiguous keys; error against float64; {rounds}"
        )
        found.append(Table("Prompts, and prompts behind a prefix", columns, rows, 4, caption))
    if "memory" in report:
        rows = [
            [f"{case['tokens']:,}", *(f"{case['bytes'] / by:,.0f}" for by in (2**20, case["tokens"] * 2**10))]
            for case in report["memory"]
            if case["bytes"]
        ]
        caption = f"{machine}; a process of its own for each; two layers of the shape 0.5b, bfloat16, one prompt"
        columns = ["tokens", "MiB", "KiB a token"]
        found.append(Table("Peak of memory above what the model takes", columns, rows, 1, caption))
    if "decode" in report:
        case = report["decode"]
        row = [f"{case['context']:,}", *(_milliseconds(case["ms_per_step"][name]["median"]) for name in (STOCK, OURS))]
        if "read_bytes" in case:  # not in older reports
            reading = 1e3 * case["read_bytes"] / case["bytes_per_second"]
            rounds += f"; reading all weights and keys takes {_milliseconds(reading)} ms"
        goal = "" if report["quick"] else f"{case['goal']:g}"
        row += [ratio_text(case["ratio"]) or "FAILED", goal, same_text(case["equality"])]
        columns = ["context", "stock ms/step", "llmopt ms/step", "× stock", "goal", "same tokens"]
        found.append(Table(f"Decoding, {case['shape']}", columns, [row], 1, f"{machine}; through `generate`; {rounds}"))
    return found
