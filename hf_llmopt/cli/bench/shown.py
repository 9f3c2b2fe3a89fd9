"""The end of every bench command: the report into a file, and shown; exit code 1 if it did not pass."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .. import ui
from ..command import Json, UserError
from .options import Markdown, Output, Quick, parent, require_folders

if TYPE_CHECKING:
    from hf_llmopt.bench.report import Table


@dataclass(frozen=True)
class Ending:
    """The options that every benchmark ends with, and what they ask for.

    Attributes:
        quick: Small and few of all was measured.
        markdown: Show Markdown tables.
        output: Also write the report to this file.
        json: Show the report instead of tables.
    """

    quick: Quick = False
    markdown: Markdown = False
    output: Output = None
    json: Json = False

    def require_folders(self, *others: Path | None) -> None:
        """Refuse to measure for nothing.

        Raises:
            UserError: The report's folder or another one does not exist, or may not be written to.
        """
        require_folders(parent(self.output), *others)

    def record(self, report: dict[str, Any]) -> None:
        """Note how a report came about, unless that stands in it, and write it to a file if it is to have one.

        Raises:
            UserError: The file cannot be written; what took so long to measure stands on stdout then.
        """
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        program = ["hf-llmopt"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks), "-m", "hf_llmopt"]
        report.setdefault("command", shlex.join([*program, *sys.argv[1:]]))
        report.setdefault("quick", self.quick)
        if self.output is not None:
            try:
                ui.save(self.output, report)
            except OSError as error:
                ui.emit(report)
                raise UserError(
                    f"--output {str(self.output)!r} cannot be written: {error.strerror}; see stdout"
                ) from error
        if self.quick:
            ui.talk("--quick: small and few of all, to see that it works; none of these figures counts")

    def show(self, report: dict[str, Any], tables: Sequence[Table], failures: Iterable[str]) -> None:
        """As `present`; then what was wrong, a line each.

        Raises:
            typer.Exit: With code 1, if `report["passed"]` says that it did not pass.
        """
        present(report, tables, self.json, self.markdown)
        if not report["passed"]:
            for line in failures:
                ui.fail(f"FAILED: {line}")
            raise typer.Exit(1)


def ends(command: Callable[..., None]) -> Callable[..., None]:
    """For Typer, a command that takes an `Ending` behind its own options: its attributes are options too."""
    *own, ending = signature(command, eval_str=True).parameters.values()
    options = signature(Ending, eval_str=True).parameters.values()

    @wraps(command)
    def run(**given: Any) -> None:
        command(**{ending.name: Ending(**{option.name: given.pop(option.name) for option in options})}, **given)

    vars(run)["__signature__"] = signature(command).replace(parameters=[*own, *options])
    run.__annotations__ = {option.name: option.annotation for option in (*own, *options)}
    return run


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
