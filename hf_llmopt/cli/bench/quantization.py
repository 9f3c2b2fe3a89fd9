"""`hf-llmopt bench quantization`: quantized weights against stock in bfloat16, and against llama.cpp."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import ui
from ..command import UserError
from ..models import usable
from .options import (
    Plots,
    Repeat,
    Saved,
    Seed,
    read_report,
    require_known,
)
from .shown import Ending, ends


@ends
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
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where speed is measured; everything else is measured on the CPU.")
    ] = "cpu",
    repeat: Repeat = 5,
    seed: Seed = 0,
    plots: Plots = None,
    saved: Saved = None,
    *,
    ending: Ending,
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

    ending.require_folders(plots)
    for what, given, known in (
        ("part", only, bench.PARTS),
        ("shape", shape, SHAPES),
        ("method", methods, METHODS),
    ):
        require_known(what, given, known)
    counts = _rows(rows)
    usable(device)
    if saved is not None:
        report = read_report(saved, "quantization")
    else:
        if not ui.talks():
            logging.disable_progress_bar()
        chosen: dict[str, Any] = {
            "parts": only or bench.PARTS, "shapes": shape or bench.SHAPES, "rows": counts,
            "methods": methods or tuple(METHODS), "repeats": repeat,
        }  # fmt: skip
        with ui.progress("quantization", bench.runs_of(**chosen)) as on_run:
            report = bench.bench(**chosen, seed=seed, quick=ending.quick, device=device, on_run=on_run)
        ending.record(report)
    if plots is not None:
        for found in report.get("speed", ()):
            (plots / f"quantization-{found['shape']}.svg").write_text(drawings.quantized_speed(found), "utf-8")
        if "quality" in report:
            (plots / "quantization-quality.svg").write_text(drawings.quantized_quality(report["quality"]), "utf-8")
    ending.show(report, bench.tables(report), bench.failures(report))


def _rows(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--rows takes numbers of at least 1 with commas between them, such as 1,4,16; got {text!r}")
    return counts
