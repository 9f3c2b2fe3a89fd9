"""`hf-llmopt bench flash_attention`: our kernels over pages against torch's attention, on a GPU."""

from __future__ import annotations

import shlex
import sys
from json import loads
from pathlib import Path
from typing import Annotated

import typer

from .. import ui
from ..command import Json, UserError
from ..texts import read_text


def flash_attention(
    seed: Annotated[int, typer.Option(help="Of queries, keys and values.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, to see that it works; no figure counts.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON report to this file.")] = None,
    saved: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Measure nothing: show the report in this file.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure prompts in operations a second and decoding in bytes a second; needs a CUDA device.

    Every figure stands beside the error against float64 of the same run. Exits with 1 if one is larger than torch's.
    """
    import torch

    from hf_llmopt.bench import flash_attention as bench
    from hf_llmopt.bench import report as reports

    if output is not None and not output.parent.is_dir():
        raise UserError(f"there is no folder {str(output.parent)!r} to write the report to")
    if saved is not None:
        report = loads(read_text(saved))
    elif not torch.cuda.is_available():
        raise UserError(
            "this benchmark measures CUDA kernels and found no CUDA device; --report FILE shows a saved report"
        )
    else:
        prefills = ((1, 1024, 1024), (1, 2048, 512)) if quick else bench.PREFILLS
        decodes = ((2, 4096),) if quick else bench.DECODES
        with ui.progress("flash_attention", len(prefills) + len(decodes)) as on_run:
            report = bench.bench(prefills, decodes, seed, on_run)
        report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    if output is not None:
        ui.save(output, report)
    if json:
        ui.emit(report)
    elif markdown:
        ui.say("\n\n".join(map(reports.markdown, bench.tables(report))))
    else:
        for view in bench.tables(report):
            ui.table(view.title, view.columns, view.rows, view.names, view.caption)
    if not report["passed"]:
        for line in bench.failures(report):
            ui.fail(f"FAILED: {line}")
        raise typer.Exit(1)
