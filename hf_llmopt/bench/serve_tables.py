"""What a report of `bench serve` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import Table, machine_text, model_text
from .serve import OURS, THEIRS


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report: latencies at several rates, and what HTTP costs."""
    return [made(report) for made, part in ((_rates, "points"), (_overhead, "overhead")) if report[part]]


def _rates(report: Mapping[str, Any]) -> Table:
    rows = [
        [
            "all at once" if point["rate"] is None else f"{point['rate']:.2f}",
            point["way"],
            f"{point['same']} of {point['requests']}",
            *(_ms(point["first_token"][q], 0) for q in ("p50", "p90", "p99")),
            *(_ms(point["between_tokens"][q], 1) for q in ("p50", "p90", "p99")),
            f"{point['tokens_per_second']:.0f}",
            f"{point['requests_per_second']:.2f}",
            f"{point['goodput']:.2f}" if report["passed"] or point["way"] != OURS else "FAILED",
        ]
        for point in report["points"]
    ]
    limits, load = report["limits"], report["load"]
    notes = [
        machine_text(report["environment"]),
        f"{load['requests']} requests at each rate come at random (Poisson), with prompts that begin with one of "
        f"{load['groups']} texts of {load['shared']} characters; greedy; same: as generate's",
        f"good: first token within {limits['first']:g} s, then {limits['each']:g} s a token or less",
    ]
    best = report["best"]
    if best.get(THEIRS):
        notes.append(f"best: {best[OURS]:.2f} and {best[THEIRS]:.2f} good/s, {best[OURS] / best[THEIRS]:.2f} times")
    notes += [f"{way} did not start: {' '.join(why.split())}" for way, why in report["refused"].items()]
    columns = ["requests/s", "server", "same", "first ms p50", "p90", "p99", "between ms p50", "p90", "p99"]
    columns += ["tokens/s", "answers/s", "good/s"]
    return Table(f"serve: {_model(report)}", columns, rows, 2, "; ".join(notes))


def _overhead(report: Mapping[str, Any]) -> Table:
    found = report["overhead"]
    rows = []
    for way, figures in found["ways"].items():
        times = figures["times"]
        share = "FAILED" if times is None else f"{100 * (times['ratio'] - 1):.1f} %"
        if times is not None and times["low"] is not None:
            share += f" [{100 * (times['low'] - 1):.1f}, {100 * (times['high'] - 1):.1f}]"
        rows.append(
            [way, f"{figures['engine_seconds']['median']:.3f}", f"{figures['seconds']['median']:.3f}", share],
        )
    caption = (
        f"{machine_text(report['environment'])}; {report['load']['requests']} requests of {found['clients']} clients "
        f"that wait for their answers; medians of {found['repeats']} interleaved runs; 95 % interval of paired "
        "ratios"
    )
    columns = ["answers", "engine s", "HTTP s", "above the engine"]
    return Table(f"serve, overhead: {_model(report)}", columns, rows, 1, caption)


def _model(report: Mapping[str, Any]) -> str:
    """What is served, and how if that is not the default."""
    named = report.get("llmopt", "true")
    return model_text(report["model"]) + ("" if named == "true" else f", llmopt={named}")


def _ms(seconds: float | None, digits: int) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.{digits}f}"
