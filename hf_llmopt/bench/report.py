"""From a report (one JSON object per benchmark run) to tables. Nothing in a table is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llmopt.errors import InvalidOption

from .equality import Equality
from .measure import Ratio


def parsed(text: str, path: Path) -> dict[str, Any]:
    """A report of any benchmark from its text.

    Args:
        text: JSON.
        path: Where it stood, for messages.

    Raises:
        InvalidOption: It is no report.

    Example:
        >>> from pathlib import Path
        >>> parsed('{"bench": "all"}', Path("all.json"))
        {'bench': 'all'}
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidOption(f"{path} is no report: it is no JSON ({error}). Was it cut?") from error
    if not isinstance(found, dict) or "bench" not in found:
        raise InvalidOption(f'{path} is no report of `hf-llmopt bench`: it has no "bench".')
    return found


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
        [workload["name"], name, *_cells(way), same_text(workload["equality"][name]), *_speed(workload, name)]
        for workload in report["workloads"]
        for name, way in workload["ways"].items()
    ]
    title = f"{report['bench']}: {model_text(report['model'])}"
    caption = (
        f"{machine_text(report['environment'])}; greedy; prompts: {report['prompts']}; medians of "
        f"{report['repeats']} interleaved runs; × is the geometric mean of paired ratios with its 95 % interval; own: "
        "outside the model's forward pass"
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


def _speed(workload: dict[str, Any], name: str) -> list[str]:
    if not workload["passed"]:
        return ["FAILED", "FAILED"]
    found = {ratio["over"]: ratio for ratio in workload["ratios"] if ratio["way"] == name}
    return [ratio_text(found.get(baseline)) for baseline in ("stock", "no cache")]


def ratio_text(ratio: Mapping[str, Any] | None) -> str:
    """A ratio of a report with its interval; nothing if there is none.

    Example:
        >>> ratio_text({"way": "llmopt", "ratio": 2.0, "low": 1.9, "high": 2.1})
        '2.00 [1.90, 2.10]'
    """
    return str(Ratio(ratio["ratio"], ratio["low"], ratio["high"])) if ratio else ""


def same_text(equality: Mapping[str, Any]) -> str:
    """The verdict of comparing tokens, from a report.

    Example:
        >>> same_text({"same": True, "identical": False})
        'up to near ties'
    """
    return str(Equality(equality["same"], equality["identical"], 0))


def model_text(model: Mapping[str, Any]) -> str:
    """What was measured, from a report's `"model"`."""
    ranks = model.get("ranks", 1)
    over = f", over {ranks} processes" if ranks > 1 else ""
    return f"{model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}{over}"


def machine_text(environment: Mapping[str, Any]) -> str:
    """What it was measured on, and with which versions, from a report's `"environment"`."""
    versions = environment["versions"]
    return f"{environment['hardware']}; torch {versions['torch']}, transformers {versions['transformers']}"


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
