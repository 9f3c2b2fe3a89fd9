"""`hf-llmopt demo`: the embedded model, stock beside llmopt, and whether the tokens are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui
from .command import Dtype, Json, Llmopt, MaxNewTokens, UserError, keyword

if TYPE_CHECKING:
    from hf_llmopt.bench import Run

STOCK, OURS = "stock", "llmopt"


def demo(
    prompt: Annotated[
        str | None, typer.Option(help="Python code to complete; by default one that comes along.")
    ] = None,
    llmopt: Llmopt = "true",
    max_new_tokens: MaxNewTokens = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each, interleaved; figures are medians.")] = 5,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Let the embedded model complete code, stock beside llmopt. Exits with 1 if the tokens differ."""
    wanted = keyword(llmopt)
    if wanted is False:
        raise UserError("the demo compares llmopt with stock; --llmopt false leaves nothing to compare")

    from dataclasses import replace

    from hf_llmopt import LLMOptConfig, bench
    from hf_llmopt import demo as pair
    from hf_llmopt.bench.kv_cache import describe

    from .models import load

    model, tokenizer = load("demo", dtype, "cpu")
    prompt = prompt if prompt is not None else pair.PROMPTS[3]
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise UserError("the prompt is empty; give at least one character")
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False}

    # The prompt is the same in every run, and is to be computed in every run.
    ways: dict[str, Any] = {
        STOCK: False,
        OURS: replace(LLMOptConfig.parse(wanted) or LLMOptConfig(), prompt_cache=None),
    }
    texts = _show(model, tokenizer, inputs, prompt, ways, arguments, quiet=json)
    with ui.progress("measuring", 2 * repeat) as on_run:
        measure: dict[str, Callable[[], Run]] = {
            name: lambda way=way: bench.generate(model, inputs, llmopt=way, **arguments)  # type: ignore[misc]
            for name, way in ways.items()
        }
        runs = bench.interleave(measure, repeat, on_run)
    held = _held(model, inputs, arguments, runs)
    report = _report(model, inputs, runs, held)
    report = {"model": describe(model), "prompt": prompt, "texts": texts, **report, "environment": bench.environment()}
    if json:
        ui.emit(report)
    else:
        _print(report)
    if not report["passed"]:
        raise typer.Exit(1)


def _show(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    prompt: str,
    ways: Mapping[str, Any],
    arguments: dict[str, Any],
    quiet: bool,
) -> dict[str, str]:
    """Stream both completions. Not timed, since drawing takes time too; also sets both ways up."""
    from hf_llmopt import bench

    from .streams import Writer

    with ui.Texts(list(ways), prompt, quiet) as texts:
        for name, way in ways.items():
            bench.generate(model, inputs, llmopt=way, streamer=Writer(tokenizer, texts.writer(name)), **arguments)
    return {name: text.removeprefix(prompt) for name, text in texts.texts.items()}


def _held(
    model: Any, inputs: Mapping[str, Any], arguments: dict[str, Any], runs: Mapping[str, list[Run]]
) -> dict[str, int]:
    """Bytes of keys and values that each way holds at its peak."""
    from hf_llmopt.bench.measure import cache_bytes

    output = model.generate(**inputs, **arguments, llmopt=False, return_dict_in_generate=True)
    stats = runs[OURS][-1].stats
    return {STOCK: cache_bytes(output.past_key_values), OURS: stats.page_bytes if stats is not None else 0}


def _report(
    model: Any, inputs: Mapping[str, Any], runs: Mapping[str, list[Run]], held: Mapping[str, int]
) -> dict[str, Any]:
    import psutil

    from hf_llmopt import bench
    from hf_llmopt.bench.measure import summary

    expected = runs[STOCK][0].output
    outcomes = [bench.compare(model, inputs, expected, run.output) for way in runs.values() for run in way]
    worst = min(outcomes, key=lambda outcome: (outcome.same, outcome.identical))
    served = all(run.served_by == "llmopt" for run in runs[OURS])
    passed = worst.same and served
    ratio = bench.paired_ratio([run.seconds for run in runs[STOCK]], [run.seconds for run in runs[OURS]])
    stats = runs[OURS][-1].stats
    return {
        "repeats": len(runs[OURS]),
        "ways": {
            name: {
                "generated_tokens": repeats[-1].new_tokens,
                "seconds": summary(run.seconds for run in repeats),
                "tokens_per_second": summary(run.tokens_per_second for run in repeats),
                "time_to_first_token": summary(run.time_to_first_token for run in repeats),
                "ms_per_step": summary(run.ms_per_step for run in repeats),
                "kv_bytes": held[name],
            }
            for name, repeats in runs.items()
        },
        "process_bytes": psutil.Process().memory_info().rss,
        "stats": stats.to_dict() if stats is not None else None,
        "equality": worst.to_dict(),
        "served_by_llmopt": served,
        "passed": passed,
        # Nothing is said about speed unless the tokens are the same.
        "ratio": {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high} if passed else None,
    }


def _print(report: dict[str, Any]) -> None:
    from hf_llmopt.bench import Ratio

    stock, ours, ratio = report["ways"][STOCK], report["ways"][OURS], report["ratio"]

    def row(name: str, key: str, scale: float, digits: int, inverse: bool = False) -> list[str]:
        a, b = stock[key]["median"] * scale, ours[key]["median"] * scale
        times = (a / b if inverse else b / a) if a and b and report["passed"] else None
        return [name, f"{a:.{digits}f}", f"{b:.{digits}f}", f"{times:.2f} ×" if times else ""]

    rows = [
        row("tokens per second", "tokens_per_second", 1, 1),
        row("ms per token", "ms_per_step", 1, 2, inverse=True),
        row("ms to first token", "time_to_first_token", 1e3, 1, inverse=True),
        ["keys and values, KiB", *(f"{way['kv_bytes'] / 1024:.0f}" for way in (stock, ours)), ""],
    ]
    model, machine = report["model"], report["environment"]
    title = f"{model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}, {ours['generated_tokens']} tokens"
    caption = f"{machine['hardware']}; medians of {report['repeats']} interleaved runs; the process uses "
    caption += f"{report['process_bytes'] / 2**20:.0f} MiB"
    if report["passed"] and ratio["low"] is not None:
        caption += f"; × of the whole call with its 95 % interval: {Ratio(**ratio)}"
    ui.table(title, ["", STOCK, OURS, "ratio"], rows, 1, caption)
    ui.verdict(report["passed"], _verdict(report))


def _verdict(report: dict[str, Any]) -> str:
    equality = report["equality"]
    if not report["served_by_llmopt"]:
        return f"FAILED: transformers served the llmopt runs: {report['stats']['reason']}"
    if not equality["same"]:
        where = "".join(f"; first at step {difference['step']}" for difference in equality["differences"][:1])
        return f"FAILED: other tokens than stock{where}"
    runs = f"{report['repeats']} + {report['repeats']} runs"
    if equality["identical"]:
        return f"same tokens: all {equality['tokens']} of them in {runs}"
    return f"same tokens up to near ties of {report['model']['dtype']} in {runs}"
