"""`hf-llmopt bench cpu`: the C kernels against stock on the CPU."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import ui
from ..command import Json
from .options import Markdown, Output, Quick, Repeat, Seed, chosen, parent, require_folders
from .shown import record, show


def cpu(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="One experiment; may be repeated: decode-bfloat16, long-context, throughput, breakdown, "
            "decode-float32, floor, embedded, opt, gpt2, opt-bfloat16, gpt2-bfloat16.",
        ),
    ] = None,
    repeat: Repeat = 5,
    seed: Seed = 0,
    quick: Quick = False,
    markdown: Markdown = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Measure decode steps, throughput, the distance to the memory's bandwidth and the shares of a step.

    Greedy, interleaved with stock, tokens compared in the same runs. Says nothing about speed and exits with 1 if
    tokens differ; a goal that is missed is shown.
    """
    from transformers.utils import logging

    from hf_llmopt.bench import cpu as bench
    from hf_llmopt.bench import cpu_tables as views

    require_folders(parent(output))
    if not ui.talks():
        logging.disable_progress_bar()
    experiments = chosen("experiment", only, {item.name: item for item in bench.EXPERIMENTS})
    with ui.progress("cpu", sum(bench.runs_of(item, repeat) for item in experiments)) as on_run:
        report = bench.bench(
            experiments, repeats=repeat, seed=seed, quick=quick, on_run=lambda name, run: on_run(f"{name}: {run}")
        )
    record(report, output, quick)
    show(report, views.tables(report), views.failures(report), json, markdown)
