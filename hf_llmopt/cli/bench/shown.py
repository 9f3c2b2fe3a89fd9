"""The end of every bench command: the report into a file, and shown; exit code 1 if it did not pass."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .. import ui
from ..command import UserError

if TYPE_CHECKING:
    from hf_llmopt.bench.report import Table


def record(report: dict[str, Any], output: Path | None, quick: bool) -> None:
    """Note how a report came about, unless that stands in it, and write it to a file if it is to have one.

    Raises:
        UserError: The file cannot be written; what took so long to measure stands on stdout then.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    program = ["hf-llmopt"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks), "-m", "hf_llmopt"]
    report.setdefault("command", shlex.join([*program, *sys.argv[1:]]))
    report.setdefault("quick", quick)
    if output is not None:
        try:
            ui.save(output, report)
        except OSError as error:
            ui.emit(report)
            raise UserError(f"--output {str(output)!r} cannot be written: {error.strerror}; see stdout") from error
    if quick:
        ui.talk("--quick: small and few of all, to see that it works; none of these figures counts")


def present(report: dict[str, Any], tables: Sequence[Table], json: bool, markdown: bool) -> None:
    """Write a report to stdout.

    Args:
        report: What was found.
        tables: The same as tables.
        json: JSON instead of tables.
        markdown: Markdown tables.
    """
    from hf_llmopt.bench import report as reports

    if json:
        ui.emit(report)
    elif markdown:
        ui.say("\n\n".join(map(reports.markdown, tables)))
    else:
        for view in tables:
            ui.table(view.title, view.columns, view.rows, view.names, view.caption)


def show(report: dict[str, Any], tables: Sequence[Table], failures: Iterable[str], json: bool, markdown: bool) -> None:
    """As `present`; then what was wrong, a line each.

    Raises:
        typer.Exit: With code 1, if `report["passed"]` says that it did not pass.
    """
    present(report, tables, json, markdown)
    if not report["passed"]:
        for line in failures:
            ui.fail(f"FAILED: {line}")
        raise typer.Exit(1)
