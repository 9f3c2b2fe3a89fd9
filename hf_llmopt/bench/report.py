"""From a report (one JSON object per benchmark run) to tables. Nothing in a table is typed by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .measure import Ratio


@dataclass(frozen=True)
class Table:
    """Cells as text; the command line and Markdown render them.

    Attributes:
        title: One line.
        columns: Headings; the first columns name things, the others hold figures.
        rows: As many cells as columns.
        names: How many columns name things.
        caption: What one has to know to read the figures.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    names: int = 2
    caption: str = ""


def table(report: dict[str, Any]) -> Table:
    """The table of a report: a row for each workload and way, the baseline's before ours.

    Args:
        report: As a benchmark returned it, or as read back from JSON.
    """
    columns = [
        "workload",
        "way",
        "tokens/s",
        "ms/step",
        "first token ms",
        "own ms/step",
        "KV MiB",
        "pages",
        "same tokens",
        "× stock",
        "× no cache",
    ]
    rows = [
        [workload["name"], name, *_cells(way), _same(workload, name), *_speed(workload, name)]
        for workload in report["workloads"]
        for name, way in workload["ways"].items()
    ]
    model, machine = report["model"], report["environment"]
    title = (
        f"{report['bench']}: {model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}"
    )
    versions = machine["versions"]
    caption = (
        f"{machine['hardware']}; torch {versions['torch']}, transformers {versions['transformers']}; greedy; "
        f"prompts: {report['prompts']}; medians of {report['repeats']} interleaved runs; × is the "
        "geometric mean of paired ratios with its 95 % interval; own: outside the model's forward pass"
    )
    if "floor_ms_per_step" in report:
        caption += f"; reading all weights takes {report['floor_ms_per_step']:.2f} ms"
    return Table(title, columns, rows, 2, caption)


def failures(report: dict[str, Any]) -> list[str]:
    """Why the report did not pass, a line for each reason."""
    return [f"{workload['name']}: {reason}" for workload in report["workloads"] for reason in workload["reasons"]]


def _cells(way: dict[str, Any]) -> list[str]:
    own = way["overhead_ms_per_step"]
    return [
        f"{way['tokens_per_second']['median']:.1f}",
        f"{way['ms_per_step']['median']:.2f}",
        f"{way['time_to_first_token']['median'] * 1e3:.1f}",
        f"{own['median']:.2f}" if own else "",
        f"{way['kv_bytes'] / 2**20:.2f}" if way["kv_bytes"] else "",
        str(way["pages"]) if way["pages"] is not None else "",
    ]


def _same(workload: dict[str, Any], name: str) -> str:
    outcome = workload["equality"][name]
    if not outcome["same"]:
        return "NO"
    return "yes" if outcome["identical"] else "up to near ties"


def _speed(workload: dict[str, Any], name: str) -> list[str]:
    if not workload["passed"]:
        return ["FAILED", "FAILED"]
    found = {ratio["over"]: ratio for ratio in workload["ratios"] if ratio["way"] == name}
    return [_ratio(found.get(baseline)) for baseline in ("stock", "no cache")]


def _ratio(ratio: dict[str, Any] | None) -> str:
    return str(Ratio(ratio["ratio"], ratio["low"], ratio["high"])) if ratio else ""


def markdown(table: Table) -> str:
    """Render a table as Markdown, figures on the right.

    Args:
        table: Any table.

    Example:
        >>> print(markdown(Table("", ["way", "tokens/s"], [["stock", "12.0"]], names=1)))
        | way | tokens/s |
        |---|---:|
        | stock | 12.0 |
    """
    lines = [f"**{table.title}**", ""] if table.title else []
    lines.append(_line(table.columns))
    lines.append("|" + "|".join("---" if i < table.names else "---:" for i in range(len(table.columns))) + "|")
    lines += [_line(row) for row in table.rows]
    return "\n".join([*lines, "", table.caption] if table.caption else lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
