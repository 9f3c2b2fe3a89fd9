"""Pages of each number format at long contexts: quality, memory, error of attention and speed of decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_llmopt import LLMOptConfig, demo, optimize
from hf_llmopt.config import KVCacheConfig, PromptCacheConfig
from hf_llmopt.demo.corpus import held_out_texts

from ..kernels import cpu, reference
from ..kernels.arguments import PAGE_FORMATS, Seen
from .flash_attention import Problem, problem
from .kv_cache import describe
from .measure import Ratio, environment, generate, interleave, paired_ratio, summary
from .quality import perplexity
from .report import Table
from .sample import Sample
from .workloads import build

DENSE = "bfloat16"
FORMATS = (DENSE, *PAGE_FORMATS)
PERPLEXITY = {"int8": 1.001, "fp8": 1.005, "int4": 1.015}  # most times that of pages in the model's own numbers
MEMORY = {"int8": 0.53, "fp8": 0.53, "int4": 0.29}  # most, beside bfloat16
HEADS = (14, 2, 64)  # of the shape 0.5b
CONTEXT = 8192


def steps() -> int:
    """How often `on_run` is called."""
    return 3 * len(FORMATS) + 1


def bench(
    repeats: int = 5, seed: int = 0, quick: bool = False, on_run: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measure every page format.

    Args:
        repeats: Timed runs of each format, interleaved.
        seed: Of prompts, weights, keys.
        quick: Short texts and contexts, a miniature model: no figure counts.
        on_run: Called before each measurement.

    Returns:
        The report, ready for JSON. `report["passed"]`: perplexity and memory keep their bounds, and llmopt served every
        call. Speed does not fail it.
    """
    context = 128 if quick else CONTEXT
    report: dict[str, Any] = {
        "bench": "kv_cache --long",
        "environment": environment(),
        "repeats": repeats,
        "seed": seed,
    }
    report |= {"quick": quick, "kernels": cpu.used() if cpu.available() else cpu.why_not()}
    report["quality"] = _quality(1024 if quick else 32768, on_run)
    report["attention"] = _errors(context, seed, on_run)
    report["speed"] = _speed(context, repeats, seed, quick, on_run)
    report["passed"] = not failures(report)
    return report


def _quality(tokens: int, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Perplexity of the embedded model with each format, as a multiple of that with its own numbers."""
    model, tokenizer = demo.load()
    sample = Sample.cut(model, tokenizer, held_out_texts(), context=512, tokens=tokens)
    found, formats = {}, {}
    for name in FORMATS:
        on_run(f"perplexity, {name}")
        optimize(model, llmopt=_config(name))
        found[name] = perplexity(model, sample)
        times = found[name].over(found[DENSE])
        formats[name] = {**found[name].to_dict(), "times": vars(times)}
    return {"model": {"name": "demo", **describe(model)}, "formats": formats}


def _config(name: str) -> LLMOptConfig:
    return LLMOptConfig(
        kv_cache=KVCacheConfig(dtype="auto" if name == DENSE else name), prompt_cache=PromptCacheConfig()
    )


def _errors(context: int, seed: int, on_run: Callable[[str], None]) -> dict[str, float]:
    """Error of attention of single tokens against float64, keys and values normal, relative."""
    case = problem(1, context, 8, torch.Generator("cpu").manual_seed(seed), True, HEADS)
    found = {}
    for name in FORMATS:
        on_run(f"error of attention, {name}")
        seen = case.seen if name == DENSE else _packed(case, name)
        found[name] = case.error(cpu.attention(case.query, seen))
    return found


def _packed(case: Problem, name: str) -> Seen:
    form, shape = PAGE_FORMATS[name], case.seen.shape
    keys = reference.pack_rows(case.seen.keys, form, form.rotates)
    return case.seen._replace(keys=keys, values=reference.pack_rows(case.seen.values, form), form=form, coded=shape)


def _speed(context: int, repeats: int, seed: int, quick: bool, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Steps behind a long prompt through `generate`; each format computes it once, and then finds it."""
    model = build("0.5b", torch.bfloat16, seed, quick)
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(seed))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = {"max_new_tokens": 5 if quick else 33, "do_sample": False, "eos_token_id": None}
    size, reasons, runs = {}, [], {}
    for name in FORMATS:  # one after the other: another format is another engine
        on_run(f"decoding at {context}, {name}")
        generate(model, inputs, llmopt=_config(name), **options)
    on_run(f"decoding at {context}")
    ways = {name: lambda name=name: generate(model, inputs, llmopt=_config(name), **options) for name in FORMATS}
    runs = interleave(ways, repeats)
    for name, found in runs.items():
        stats = [run.stats for run in found if run.stats is not None]
        size[name] = stats[-1].page_bytes
        reasons += [f"{name}: transformers served the call: {s.reason}" for s in stats if s.served_by != "llmopt"]
    times = {name: [run.ms_per_step for run in found] for name, found in runs.items()}
    ratios = {name: paired_ratio(times[DENSE], found) for name, found in times.items() if name != DENSE}
    return {
        "shape": "0.5b, bfloat16",
        "context": context,
        "ms_per_step": {name: summary(found) for name, found in times.items()},
        "ratios": {name: {"ratio": r.ratio, "low": r.low, "high": r.high} for name, r in ratios.items()},
        "page_bytes": size,
        "reasons": reasons,
    }


def failures(report: dict[str, Any]) -> list[str]:
    """Bounds that are broken and calls that were not served, a line for each."""
    size, lines = report["speed"]["page_bytes"], list(report["speed"]["reasons"])
    if report["quick"]:  # a few tokens, and heads so narrow that scales weigh much
        return lines
    for name, bound in PERPLEXITY.items():
        times = report["quality"]["formats"][name]["times"]["value"]
        if times > bound:
            lines.append(f"{name}: {times:.4f} times the perplexity, at most {bound}")
    for name, bound in MEMORY.items():
        if size[name] > bound * size[DENSE]:
            lines.append(f"{name}: {size[name] / size[DENSE]:.3f} of bfloat16's bytes, at most {bound}")
    return lines


def tables(report: dict[str, Any]) -> list[Table]:
    """One table, a row for each format."""
    machine, speed = report["environment"], report["speed"]
    versions = machine["versions"]
    rows = []
    for name in FORMATS:
        quality, times = report["quality"]["formats"][name], report["quality"]["formats"][name]["times"]
        change = (
            "" if name == DENSE else f"{_percent(times['value'])} [{_percent(times['low'])}, {_percent(times['high'])}]"
        )
        rows.append([name, f"{quality['perplexity']:.3f}", change, f"{report['attention'][name]:.1e}"])
        rows[-1].append(f"{speed['page_bytes'][name] / speed['page_bytes'][DENSE]:.3f}")
        rows[-1].append(f"{speed['ms_per_step'][name]['median']:.1f}")
        rows[-1].append(str(Ratio(**speed["ratios"][name])) if name != DENSE and not speed["reasons"] else "")
    columns = [
        "pages",
        "perplexity",
        "against the model's own",
        "error of attention",
        "memory",
        "ms/step",
        "× bfloat16",
    ]
    tokens = report["quality"]["formats"][DENSE]["tokens"]
    caption = (
        f"{machine['hardware']}; torch {versions['torch']}, transformers {versions['transformers']}; perplexity of the "
        f"embedded model over {tokens:,} held-out tokens, windows of 512, the first row with its own float32 pages; "
        f"error against float64 over {speed['context']:,} normal keys; steps of the shape {speed['shape']}, behind "
        f"{speed['context']:,} tokens, medians of {report['repeats']} interleaved runs; 95 % intervals"
    )
    return [Table("Pages of each number format", columns, rows, 1, caption)]


def _percent(times: float | None) -> str:
    return "" if times is None else f"{100 * (times - 1):+.3f} %"
