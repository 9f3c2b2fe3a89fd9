"""`hf-llmopt bench prompt_cache`: prompts that are found against prompts that are computed."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import ui
from ..command import Device, Dtype
from .options import Model, Repeat, Seed, Shape, chosen, load_or_build
from .shown import Ending, ends


@ends
def prompt_cache(
    model: Model = None,
    shape: Shape = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="prefix-0, prefix-50, prefix-90, long-prefix (2,000 tokens), chat or agent; may be repeated. All by "
            "default."
        ),
    ] = None,
    repeat: Repeat = 5,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    *,
    ending: Ending,
) -> None:
    """Measure the time to the first token of prompts whose beginning is found in memory, on disk, or not at all.

    Greedy, every way interleaved with the others, tokens compared in the same runs. Says nothing about speed and exits
    with 1 if tokens differ.
    """
    from hf_llmopt.bench import prompt_cache as pc
    from hf_llmopt.bench import report as reports

    ending.require_folders()
    workloads = chosen("workload", workload, {item.name: item for item in (pc.QUICK if ending.quick else pc.WORKLOADS)})
    loaded, texts, name = load_or_build(model, shape, dtype, device, seed)
    with ui.progress("prompt_cache", sum(pc.runs_of(item, repeat) for item in workloads)) as on_run:
        report = pc.bench(
            loaded,
            workloads,
            texts=texts,
            repeats=repeat,
            seed=seed,
            on_run=lambda name, way: on_run(f"{name}, {way}"),
        )
    report["model"]["name"] = name
    ending.record(report)
    ending.show(report, [pc.table(report)], reports.failures(report))
