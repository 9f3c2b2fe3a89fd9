"""What a report of `bench hops` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import Table, machine_text


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report: the way to the engine, and all-reduces."""
    plan = report["plan"]
    rows, before = [], None
    for way, found in report["ways"].items():
        figures = [found[kind]["median"] * 1e3 for kind in ("seconds_per_request", "seconds_per_token")]
        added = ["", ""] if before is None else [f"{a - b:+.2f}" for a, b in zip(figures, before, strict=True)]
        rows.append([way, f"{figures[0]:.2f}", added[0], f"{figures[1]:.2f}", added[1]])
        before = figures
    caption = (
        f"{machine_text(report['environment'])}; one client, one request at a time, its prompt cached; medians of "
        f"{plan['repeats']} interleaved runs of {plan['requests']} requests for one token, and of streams of "
        f"{plan['tokens']}; hop: above the row before"
    )
    reduced = [
        [f"{int(size) // 1024} KiB", f"{found['median'] * 1e6:.0f}"]
        for size, found in report["all_reduce_seconds"].items()
    ]
    return [
        Table("the way to an engine", ["way", "request ms", "hop ms", "token ms", "hop ms"], rows, 1, caption),
        Table("all-reduce over two processes (gloo)", ["size", "µs"], reduced, 1, machine_text(report["environment"])),
    ]
