"""`hf-llmopt bench cpu`: the C kernels against stock on the CPU."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import ui
from .options import Repeat, Seed, chosen
from .shown import Ending, ends


@ends
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
    *,
    ending: Ending,
) -> None:
    """Measure decode steps, throughput, the distance to the memory's bandwidth and the shares of a step.

    Greedy, interleaved with stock, tokens compared in the same runs. Says nothing about speed and exits with 1 if
    tokens differ; a goal that is missed is shown.
    """
    from transformers.utils import logging

    from hf_llmopt.bench import cpu as bench
    from hf_llmopt.bench import cpu_tables as views

    ending.require_folders()
    if not ui.talks():
        logging.disable_progress_bar()
    experiments = chosen("experiment", only, {item.name: item for item in bench.EXPERIMENTS})
    with ui.progress("cpu", sum(bench.runs_of(item, repeat) for item in experiments)) as on_run:
        report = bench.bench(
            experiments,
            repeats=repeat,
            seed=seed,
            quick=ending.quick,
            on_run=lambda name, run: on_run(f"{name}: {run}"),
        )
    ending.record(report)
    ending.show(report, views.tables(report), views.failures(report))
