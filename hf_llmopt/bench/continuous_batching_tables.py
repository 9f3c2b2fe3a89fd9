"""What a report of `continuous_batching` says: throughput, latencies at several request rates, why it did not pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import Table, machine_text, model_text, ratio_text


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report: throughput, and latencies at several rates."""
    caption = (
        f"{machine_text(report['environment'])}; greedy; prompts: {report['prompts']}; medians of {report['repeats']} "
        "interleaved runs; × is the geometric mean of paired ratios with its 95 % interval"
    )
    made = [
        Table(
            f"continuous_batching: {model_text(report['model'])}",
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
        outcome = load["equality"][name]
        rows.append(
            [
                load["name"],
                name,
                str(load["requests"]),
                str(load["new_tokens"]),
                f"{way['seconds']['median']:.2f}",
                f"{way['tokens_per_second']['median']:.1f}",
                f"{outcome['identical']} of {outcome['requests']}" + ("" if outcome["same"] else ", NOT the same"),
                ratio_text(ratios.get(name)) if load["passed"] else "FAILED",
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
