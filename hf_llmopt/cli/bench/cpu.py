"""`hf-llmopt bench cpu`: the C kernels against stock on the CPU."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import ui
from ..command import Json, UserError
from .shown import show


def cpu(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="One experiment; may be repeated: decode-bfloat16, long-context, throughput, breakdown, "
            "decode-float32, floor, embedded, opt, gpt2, opt-bfloat16, gpt2-bfloat16.",
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each way, interleaved.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the prompts and of random weights.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Miniature models and prompts, to see that it works; no figure counts.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON report to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure decode steps, throughput, the distance to the memory's bandwidth and the shares of a step.

    Greedy, interleaved with stock, tokens compared in the same runs. Says nothing about speed and exits with 1 if
    tokens differ; a goal that is missed is shown.
    """
    from transformers.utils import logging

    from hf_llmopt.bench import cpu as bench
    from hf_llmopt.errors import unknown

    if output is not None and not output.parent.is_dir():
        raise UserError(f"there is no folder {str(output.parent)!r} to write the report to")
    by_name = {item.name: item for item in bench.EXPERIMENTS}
    for name in only or []:
        if name not in by_name:
            raise unknown("experiment", name, by_name)
    if not ui.talks():
        logging.disable_progress_bar()
    chosen = [item for item in bench.EXPERIMENTS if not only or item.name in only]
    with ui.progress("cpu", sum(bench.runs_of(item, repeat) for item in chosen)) as on_run:
        report = bench.bench(
            chosen, repeats=repeat, seed=seed, quick=quick, on_run=lambda name, run: on_run(f"{name}: {run}")
        )
    report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    if output is not None:
        ui.save(output, report)
    show(report, bench.tables(report), bench.failures(report), json, markdown)
