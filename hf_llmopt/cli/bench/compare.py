"""`hf-llmopt bench compare`: what changed between two reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import ui
from ..command import Json, UserError
from ..texts import read_text
from .options import Markdown, Output, parent, require_folders
from .shown import present


def compare(
    first: Annotated[Path, typer.Argument(help="A report, JSON as --output writes it: what was.")],
    second: Annotated[Path, typer.Argument(help="Another one of the same benchmark: what is.")],
    only: Annotated[str | None, typer.Option(metavar="TEXT", help="Only figures whose name contains this.")] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Also times and rates, not only ratios, which are of one machine each.")
    ] = False,
    bound: Annotated[
        float, typer.Option(min=0.0, help="Warn of ratios below this share of what they were; says nothing at 0.")
    ] = 0.0,
    markdown: Markdown = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Set two reports of one benchmark beside each other, every figure with its 95 % interval.

    Whatever the figures say, the exit code is 0: that something is slower is reported, not judged.
    """
    from hf_llmopt.bench import comparison as bench
    from hf_llmopt.bench import report as reports

    require_folders(parent(output))
    found = bench.compare(*(reports.parsed(read_text(path), path) for path in (first, second)))
    if only is not None:
        for kind in ("ratios", "figures"):
            found[kind] = [entry for entry in found[kind] if only in entry["what"]]
    if not found["ratios"] and not found["figures"]:
        raise UserError("the two reports have no figure in common" + (f" whose name contains {only!r}" if only else ""))
    if output is not None:
        ui.save(output, found)
    tables = bench.tables(found, figures or not found["ratios"])
    present(found, tables, json, markdown)
    for line in bench.below(found, bound):
        ui.warn(f"below {bound:g} of what it was: {line}")
