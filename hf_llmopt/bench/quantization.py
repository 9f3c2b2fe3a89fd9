"""Part 3: quantized weights against stock in bfloat16: speed, quality, memory, and llama.cpp beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_llmopt.kernels import cpu

from . import llama_cpp, load_memory, quantized_quality, quantized_speed
from .measure import environment
from .quantized import METHODS
from .report import Table, ratio_text

SHAPES = ("0.5b", "1.2b-llama")
ROWS = (1, 4, 8, 16, 128)
PARTS = ("speed", "quality", "memory", "llama.cpp")
OnRun = Callable[[str], None]


def bench(
    parts: Sequence[str] = PARTS,
    *,
    shapes: Sequence[str] = SHAPES,
    rows: Sequence[int] = ROWS,
    methods: Sequence[str] = tuple(METHODS),
    repeats: int = 5,
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    on_run: OnRun = lambda what: None,
) -> dict[str, Any]:
    """Measure what quantized weights gain and what they cost.

    Args:
        parts: Of `PARTS`: speed of shapes with random weights; quality on the embedded model; memory while a model is
            quantized as it is loaded; llama.cpp on the same shapes.
        shapes: Names in `workloads.SHAPES`.
        rows: Requests in a decode step.
        methods: Names in `METHODS`.
        repeats: Timed runs of each way, interleaved, after one that is not timed.
        seed: Of prompts and weights.
        quick: Miniature models, few tokens: no figure counts.
        device: Where speed is measured.
        on_run: Called with what has run.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether the results were those of the dequantized weights
        and llmopt served its calls. A goal that was missed does not fail it.
    """
    report: dict[str, Any] = {
        "bench": "quantization",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "quick": quick,
        "environment": environment(),
        "kernels": cpu.levels()[-1] if cpu.available() else cpu.why_not(),
    }
    if "quality" in parts:
        report["quality"] = quantized_quality.measure(quick, on_run)
    if "memory" in parts:
        report["memory"] = [load_memory.measure(shape, METHODS["int4"], quick, on_run) for shape in shapes]
    if "speed" in parts:
        report["speed"] = [
            quantized_speed.measure_shape(shape, rows, methods, repeats, seed, quick, on_run, device)
            for shape in shapes
        ]
    if "llama.cpp" in parts:
        report["llama.cpp"] = llama_cpp.measure(shapes, repeats, quick, on_run)
    report["passed"] = not failures(report)
    return report


def runs_of(
    parts: Sequence[str], shapes: Sequence[str], rows: Sequence[int], methods: Sequence[str], repeats: int
) -> int:
    """How often `on_run` is called."""
    speed = len(shapes) * (len(methods) + (len(rows) + 1) * (len(methods) + 2) * (repeats + 1))
    counts = {
        "speed": speed,
        "quality": len(quantized_quality.CASES) + 1,
        "memory": len(shapes),
        "llama.cpp": llama_cpp.runs_of(shapes, repeats),
    }
    return sum(counts[part] for part in parts)


def failures(report: Mapping[str, Any]) -> list[str]:
    """Why the report did not pass, a line for each reason."""
    shapes = [(found["shape"], case) for found in report.get("speed", ()) for case in found["cases"]]
    found = [f"{shape}, {case['name']}: {reason}" for shape, case in shapes for reason in case["reasons"]]
    for case in report.get("quality", {}).get("cases", ()):
        found += [f"{case['name']}: {reason}" for reason in case["reasons"]]
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report, some for each part that it holds.

    Args:
        report: As `bench` returned it, or as read back from JSON.
    """
    quick = report["quick"]
    made = [table for found in report.get("speed", ()) for table in _speed_tables(found, quick)]
    if "quality" in report:
        made.append(_quality_table(report["quality"]))
    if "memory" in report:
        made.append(_memory_table(report["memory"], quick))
    peer = report.get("llama.cpp", {})
    if peer.get("cases") or (peer and not made):  # where nothing else was measured, why this was not is all to be said
        made.append(_peer_table(peer, quick))
    if made:
        made[-1] = replace(made[-1], caption="; ".join(filter(None, [made[-1].caption, _caption(report)])))
    return made


def _caption(report: Mapping[str, Any]) -> str:
    machine = report["environment"]
    on_cpu = all(found["model"]["device"] == "cpu" for found in report.get("speed", ()))
    kernels = f"kernels: {report['kernels']}; " if on_cpu else ""  # of the CPU, which a GPU's steps do not use
    caption = (
        f"{machine['hardware']}, {machine['threads']} threads; {kernels}torch "
        f"{machine['versions']['torch']}, transformers {machine['versions']['transformers']}; medians of "
        f"{report['repeats']} interleaved runs; × is the geometric mean of paired ratios with its 95 % interval"
    )
    skipped = report.get("llama.cpp", {}).get("skipped")
    parts = ["miniature models: no figure counts"] if report["quick"] else []
    return "; ".join([*parts, caption, *([f"llama.cpp: {skipped}"] if skipped else [])])


def _goal(goal: str, met: bool | None, quick: bool) -> str:
    """A goal, and whether it was met; neither is said of miniature models."""
    return "" if quick else goal + {None: "", True: ": met", False: ": missed"}[met]


def _speed_tables(found: Mapping[str, Any], quick: bool) -> list[Table]:
    rows = []
    for case in found["cases"]:
        for name, ms in case["ms"].items():
            ratio, goal = case["ratios"].get(name), case["goals"].get(name)
            speed = "FAILED" if case["reasons"] else ratio_text(ratio)
            met = None if goal is None or ratio is None else ratio["ratio"] >= goal
            shown = "" if goal is None else _goal(f"≥ {goal:g}", met, quick)
            rows.append([case["name"], name, f"{ms['median']:.2f}", speed, shown])
    title = f"quantization: {found['shape']}, {found['model']['parameters'] / 1e6:.0f} M random weights"
    sizes = [
        [
            name,
            f"{way['bytes'] / 1e6:.0f}",
            f"{way['bytes'] / found['bytes']:.3f}",
            f"{way['products'] / way['products_before']:.3f}",
            f"{way['error']['weights']:.4f}",
            f"{way['error']['activations']:.4f}",
        ]
        for name, way in found["methods"].items()
    ]
    return [
        Table(title, ["what", "way", "ms", "× stock", "goal"], rows, 2, "ms of a decode step; of a prompt, to its end"),
        Table(
            f"{title}: memory, and error against the dequantized weights",
            ["method", "MB", "of bfloat16", "products, of bfloat16", "error, weights only", "error, int8 activations"],
            sizes, 1, f"bfloat16: {found['bytes'] / 1e6:.0f} MB; error: relative, of what the output head reads",
        ),
    ]  # fmt: skip


def _quality_table(found: Mapping[str, Any]) -> Table:
    base = found["baseline"]
    rows = [["bfloat16", f"{base['perplexity']:.4f}", "", "", "", "1", ""]]
    for case in found["cases"]:
        usual, error = case["with_int8_activations"], case["int8_activations_error"]
        verdict = "FAILED" if case["reasons"] else "yes" if case["equality"] else ""
        rows.append(
            [
                case["name"], f"{case['perplexity']['perplexity']:.4f}", _interval(case["times"]),
                _interval(usual["times"]), "" if case["over_rtn"] is None else _interval(case["over_rtn"]),
                f"{case['bytes'] / found['bytes']:.3f}", f"{verdict}" + ("" if error is None else f", {error:.4f}"),
            ]
        )  # fmt: skip
    columns = [
        "method", "perplexity", "× bfloat16", "× bfloat16, int8 activations", "× rtn", "memory", "same tokens, error"
    ]  # fmt: skip
    caption = (
        f"{found['model']}, {base['tokens']:,} held-out tokens in windows of {found['context']}; perplexity with the "
        "activations as they are; intervals: paired bootstrap over windows; memory: of the float32 model; same tokens: "
        "greedy, as the dequantized weights in stock generate; error: of logits with int8 activations against those "
        "weights, RMS over standard deviation"
    )
    return Table("quantization: quality", columns, rows, 1, caption)


def _memory_table(found: Sequence[Mapping[str, Any]], quick: bool) -> Table:
    rows = [
        [
            case["shape"], case["method"], f"{case['bytes_before'] / 1e6:.0f}", f"{case['bytes'] / 1e6:.0f}",
            f"{(case['bytes'] - case['mapped']) / 1e6:.0f}",
            *("unknown" if case[name] is None else f"{case[name] / 1e6:.0f}" for name in ("peak", "peak_mapped")),
            f"{case['largest_product'] / 1e6:.0f}",
            "" if case["peak"] is None
            else f"{case['over']:.2f}" + _goal(f", ≤ {case['goal']}", case["over"] <= case["goal"], quick),
        ]
        for case in found
    ]  # fmt: skip
    columns = [
        "shape", "method", "bfloat16 MB", "result MB", "of it own", "peak, own", "peak, files", "one layer",
        "(peak - layer) / result, own",
    ]  # fmt: skip
    caption = (
        "own: memory that belongs to no file; files: their pages that were in memory, which the system may take back. "
        "Weights that stay as they are, here the embedding, remain mapped"
    )
    return Table("quantization: memory while a model is quantized as it is loaded", columns, rows, 2, caption)


def _peer_table(found: Mapping[str, Any], quick: bool) -> Table:
    rows = [
        [
            f"{case['shape']}, {case['rows']} rows", f"{case['format']} and {case['method']}",
            *(f"{ms['median']:.2f}" for ms in case["ms"].values()), ratio_text(case["ratio"]),
            _goal(f"≥ {case['goal']:g}", case["ratio"]["ratio"] >= case["goal"], quick),
        ]
        for case in found.get("cases", ())
    ]  # fmt: skip
    version = f"llama-cpp-python {found['version']}" if "version" in found else ""
    columns = ["what", "formats", "llama.cpp ms", "llmopt ms", "× llama.cpp", "goal"]
    return Table("quantization: steps beside llama.cpp", columns, rows, 2, version)


def _interval(times: Mapping[str, Any]) -> str:
    interval = "" if times["low"] is None else f" [{times['low']:.4f}, {times['high']:.4f}]"
    return f"{times['value']:.4f}{interval}"
