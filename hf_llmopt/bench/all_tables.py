"""Tables of a report of `bench all`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .all import failures, slower
from .all_cases import AUTOMATIC, STOCK, WAYS
from .all_plan import FULL, PARTS
from .report import Table, machine_text, markdown, model_text, ratio_text, same_text


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of what a report holds, of one that was not finished too.

    Args:
        report: As `bench` returned it, or as read back from JSON.
    """
    report = shown(report)
    made = [_cases(report), _ways(report), _alone(report), _quality(report), _matrix(report)]
    found = [table for table in made if table.rows]
    if found:
        found[-1] = replace(found[-1], caption="; ".join(filter(None, [found[-1].caption, _caption(report)])))
    return found


def shown(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """A report as it is shown: of one of --quick, whose figures do not count, no interval."""
    return {name: _without_intervals(value) for name, value in report.items()} if report.get("quick") else report


def _without_intervals(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: None if key in ("low", "high") else _without_intervals(inner) for key, inner in value.items()}
    return [_without_intervals(inner) for inner in value] if isinstance(value, list) else value


def page(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown: the verdicts, then the tables."""
    lines = [f"- {line}" for line in verdicts(report)]
    return "\n\n".join(["\n".join(lines), *map(markdown, tables(report))])


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """What the report says, a sentence each."""
    said = []
    if report["cases"] and not report.get("quick"):
        behind, number = slower(report), len(report["cases"])
        said.append(
            f"llmopt=True: not slower than stock in {number - len(behind)} of {number} cases"
            + (f"; not shown for {'; '.join(behind)}" if behind else "")
        )
    if report["matrix"]:
        cells = [cell for unit in report["matrix"] for cell in unit["cells"]]
        right = sum(cell["passed"] for cell in cells)
        said.append(f"the matrix: {right} of {len(cells)} combinations give the tokens that they have to give")
    if report["quality"]:
        kept = sum(unit["passed"] for unit in report["quality"])
        said.append(f"quality: {kept} of {len(report['quality'])} pairs of number formats keep their bound")
    if not report["complete"]:
        said.append("this run was ended before everything was measured")
    return said + failures(report)


def _caption(report: Mapping[str, Any]) -> str:
    parts = ["few tokens of everything: no figure counts"] if report.get("quick") else []
    return "; ".join(
        [
            *parts,
            f"{model_text(report['model'])}, {report['name']}",
            machine_text(report["environment"]),
            f"{report['environment']['threads']} threads",
            f"prompts: {report['prompts']}",
            f"medians of {report['repeats']} interleaved rounds, each with prompts of its own",
            "× is the geometric mean of paired ratios" + ("" if report.get("quick") else " with its 95 % interval"),
        ]
    )


def _cases(report: Mapping[str, Any]) -> Table:
    rows = []
    for case in report["cases"]:
        stock, ours = case["ways"][STOCK], case["ways"][AUTOMATIC]
        ratio = case["ratios"].get(AUTOMATIC)
        rows.append(
            [
                case["name"],
                case["dtype"],
                *(f"{way['tokens_per_second']['median']:.1f}" for way in (stock, ours)),
                *(f"{1e3 * way['time_to_first_token']['median']:.1f}" for way in (stock, ours)),
                *(f"{way['kv_bytes'] / 2**20:.2f}" for way in (stock, ours)),
                same_text(case["equality"][AUTOMATIC]),
                "FAILED" if ratio is None else ratio_text(ratio),
                "" if ratio is None or report.get("quick") else "yes" if ratio["not_slower"] else "not shown",
            ]
        )
    columns = [
        "call of generate", "numbers", "stock tokens/s", "tokens/s", "stock first token ms", "first token ms",
        "stock KV MiB", "KV MiB", "same tokens", "× stock", "not slower",
    ]  # fmt: skip
    return Table("all: llmopt=True, case by case", columns, rows, 2, "not slower: the interval begins at 0.97 or above")


def _ways(report: Mapping[str, Any]) -> Table:
    names = [name for name in WAYS if name != STOCK]
    rows = [
        [
            case["name"],
            case["dtype"],
            *(ratio_text(case["ratios"][name]) if name in case["ratios"] else "FAILED" for name in names),
        ]
        for case in report["cases"]
    ]
    caption = (
        "times as fast as stock, whole calls; True, latency, kv_cache and speculative give stock's tokens; memory "
        "keeps keys and values in 8 bits"
    )
    return Table("all: presets and parts, case by case", ["call of generate", "numbers", *names], rows, 2, caption)


def _alone(report: Mapping[str, Any]) -> Table:
    rows = []
    for unit in report["matrix"]:
        formats = [name for name, own in (("weights", unit["weights"]), ("pages", unit["pages"])) if own != FULL]
        if len(formats) > 1:
            continue
        for cell in unit["cells"]:
            if len(formats) + len(cell["parts"]) <= 1:
                name = " and ".join([f"{unit[kind]} {kind}" for kind in formats] or cell["parts"] or ["pages"])
                rows.append([name, "no" if formats else "yes", *_cell(unit, cell)])
    columns = [
        "part",
        "exact",
        "tokens/s",
        "first token ms",
        "weights MB",
        "KV MiB",
        "tokens as",
        "same tokens",
        "× stock",
    ]
    caption = "many requests with the same beginning; a batch is compared with stock's padded batch, else one by one"
    return Table("all: each part alone", columns, rows, 2, caption)


def _quality(report: Mapping[str, Any]) -> Table:
    rows = [
        [
            unit["name"],
            f"{unit['weight_bytes'] / 1e6:.1f}",
            "" if unit["times"] is None else _interval(unit["times"]),
            f"{100 * unit['same_choice']:.1f} %",
            f"{unit['logit_error']:.4f}",
            f"{unit['measured']} ≤ {unit['bound']:.3f}: {'kept' if unit['passed'] else 'FAILED'}",
        ]
        for unit in report["quality"]
    ]
    columns = ["number formats", "weights MB", "× perplexity", "same choice", "error of logits", "bound"]
    caption = (
        "same choice: share of tokens at which both prefer the same; error: RMS, of the logits' standard deviation"
    )
    return Table("all: what number formats cost", columns, rows, 1, caption)


def _interval(times: Mapping[str, Any]) -> str:
    interval = "" if times["low"] is None else f" [{times['low']:.4f}, {times['high']:.4f}]"
    return f"{times['value']:.4f}{interval}"


def _matrix(report: Mapping[str, Any]) -> Table:
    rows = []
    for unit in report["matrix"]:
        for name, way in unit["stock"].items():
            rows.append([unit["name"], name, *_figures(way, unit["stock_weight_bytes"]), "", "", ""])
        rows += [[unit["name"], cell["name"], *_cell(unit, cell)] for cell in unit["cells"]]
    columns = [
        "number formats", "parts", "tokens/s", "first token ms", "weights MB", "KV MiB", "tokens as", "same tokens",
        "× stock",
    ]  # fmt: skip
    caption = (
        f"stock: in the model's own numbers; × over a call for each request, with batching over one call for all; "
        "tokens as: stock's, or where numbers are quantized those of the same numbers without "
        f"{', '.join(PARTS[:-1])} and {PARTS[-1]}"
    )
    return Table("all: every combination", columns, rows, 2, caption)


def _cell(unit: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    as_whom = "stock" if unit["right"] != "none" else "the plain cell"
    ratio = "FAILED" if cell["ratio"] is None else ratio_text(cell["ratio"])
    return [*_figures(cell, unit["weight_bytes"]), as_whom, same_text(cell["equality"]), ratio]


def _figures(way: Mapping[str, Any], weight_bytes: int) -> list[str]:
    return [
        f"{way['tokens_per_second']['median']:.1f}",
        f"{1e3 * way['time_to_first_token']['median']:.1f}",
        f"{weight_bytes / 1e6:.1f}",
        f"{way['kv_bytes'] / 2**20:.2f}",
    ]
