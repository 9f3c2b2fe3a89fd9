"""`hf-llmopt bench quantization`: quantized weights against stock in bfloat16, and against llama.cpp."""

from __future__ import annotations

import shlex
import sys
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import ui
from ..command import Json, UserError
from ..texts import read_text
from .shown import show


def quantization(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="speed, quality, memory or llama.cpp; may be repeated. All by default."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of random weights; may be repeated. By default 0.5b and 1.2b-llama."),
    ] = None,
    rows: Annotated[str, typer.Option(metavar="N,N", help="Requests in a decode step.")] = "1,4,8,16,128",
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="NAME", help="Of the speed part; may be repeated. All by default."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each way, interleaved.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the prompts and of random weights.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Miniature models and few tokens, to see that it works; no figure counts.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON report to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw pictures into this folder, SVG.")] = None,
    saved: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Measure nothing: show the report in this file.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure decode steps, prompts, perplexity, memory while loading, and llama.cpp where it is installed.

    Every way is interleaved with stock; results are compared with those of the dequantized weights in the same run.
    Exits with 1 if they differ; a goal that is missed is shown.
    """
    from transformers.utils import logging

    from hf_llmopt.bench import plots as drawings
    from hf_llmopt.bench import quantization as bench
    from hf_llmopt.bench.quantized import METHODS
    from hf_llmopt.bench.workloads import SHAPES
    from hf_llmopt.errors import unknown

    for folder in (output.parent if output is not None else None, plots):
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder {str(folder)!r} to write to")
    for what, given, known in (
        ("part", only, bench.PARTS),
        ("shape", shape, SHAPES),
        ("method", methods, METHODS),
    ):
        for name in given or []:
            if name not in known:
                raise unknown(what, name, known)
    counts = _rows(rows)
    if saved is not None:
        report = loads(read_text(saved))
    else:
        if not ui.talks():
            logging.disable_progress_bar()
        chosen: dict[str, Any] = {
            "parts": only or bench.PARTS, "shapes": shape or bench.SHAPES, "rows": counts,
            "methods": methods or tuple(METHODS), "repeats": repeat,
        }  # fmt: skip
        with ui.progress("quantization", bench.runs_of(**chosen)) as on_run:
            report = bench.bench(**chosen, seed=seed, quick=quick, on_run=on_run)
        report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    if output is not None:
        ui.save(output, report)
    if plots is not None:
        for found in report.get("speed", ()):
            (plots / f"quantization-{found['shape']}.svg").write_text(drawings.quantized_speed(found), "utf-8")
        if "quality" in report:
            (plots / "quantization-quality.svg").write_text(drawings.quantized_quality(report["quality"]), "utf-8")
    show(report, bench.tables(report), bench.failures(report), json, markdown)


def _rows(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--rows takes numbers of at least 1 with commas between them, such as 1,4,16; got {text!r}")
    return counts
