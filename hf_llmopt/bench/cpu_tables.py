"""What a report of `cpu` says: steps of decoding, throughput, where a step goes, why it did not pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .breakdown import PARTS
from .report import Table, ratio_text, same_text
from .requests import BATCHED, OURS


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
                    "FAILED" if case["reasons"] else ratio_text(case["ratio"]),
                    _goal(case, "×"),
                    ratio_text(case.get("whole_call")),
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
                        ratio_text(case["ratios"].get(name)), _goal(case, "") if name == OURS else "",
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


def _goal(case: dict[str, Any], unit: str) -> str:
    if case["goal"] is None:
        return ""
    verdict = "" if case["met"] is None else ": met" if case["met"] else ": missed"
    return f"{'≤' if 'at_most' in case else '≥'} {case['goal']:g}{unit}{verdict}"


def _same(equality: dict[str, Any], noise: float) -> str:
    """The verdict; below float32 with the rounding noise, and the widest gap that it had to cover."""
    verdict = same_text(equality)
    gaps = [d["gap"] for d in equality["differences"] if d["gap"] is not None]
    if not noise and not gaps:
        return verdict
    noise = min([noise, *(d["noise"] for d in equality["differences"] if d["noise"] is not None)])
    return f"{verdict} ({f'gap {max(gaps):.3f}, ' if gaps else ''}noise {noise:.3f})"


def failures(report: dict[str, Any]) -> list[str]:
    """Why the report did not pass, a line for each reason."""
    return [
        f"{result['name']}, {case['name']}: {reason}"
        for result in report["experiments"]
        for case in result["cases"]
        for reason in case["reasons"]
    ]
