"""`hf-llmopt bench continuous_batching`: requests of different lengths, against stock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import ui
from ..command import Device, Dtype
from .options import (
    Model,
    Repeat,
    Seed,
    Shape,
    load_or_build,
    parent,
    require_known,
)
from .shown import Ending, ends


@ends
def continuous_batching(
    model: Model = None,
    shape: Shape = None,
    load_: Annotated[
        list[str] | None,
        typer.Option(
            "--load",
            help="random-256, ragged-16, sharegpt or nano-vllm; may be repeated. By default all but the last. The "
            "first one is also run at several request rates.",
        ),
    ] = None,
    repeat: Repeat = 3,
    padded: Annotated[
        int | None,
        typer.Option(
            metavar="8", min=1, help="Compare with stock generate in padded batches of so many, not one by one."
        ),
    ] = None,
    first: Annotated[float, typer.Option(min=0, help="Seconds to the first token that a user accepts.")] = 1.0,
    each: Annotated[float, typer.Option(min=0, help="Seconds per further token that a user accepts.")] = 0.1,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    timeline: Annotated[Path | None, typer.Option(help="Draw the recorded schedule into this SVG file.")] = None,
    *,
    ending: Ending,
) -> None:
    """Measure requests that come and go, against a loop of stock `generate` and stock's own continuous batching.

    Throughput, and latency at several request rates. Greedy, tokens compared with stock `generate` in the same runs.
    Says nothing about speed and exits with 1 if tokens differ.
    """
    from hf_llmopt.bench import continuous_batching as bench
    from hf_llmopt.bench import continuous_batching_tables as views
    from hf_llmopt.bench import plots, requests

    ending.require_folders(parent(timeline))
    require_known("load", load_, requests.LOADS_BY_NAME)
    loaded, texts, name = load_or_build(model, shape, dtype, device, seed)
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", 2**20)
    named = [requests.LOADS_BY_NAME[name] for name in load_ or requests.DEFAULT]
    chosen = list(requests.QUICK) if ending.quick else [requests.in_miniature(item, limit) for item in named]
    with ui.progress("continuous_batching", bench.runs_of(chosen, repeat)) as on_run:
        report = bench.bench(
            loaded,
            chosen,
            texts=texts,
            repeats=repeat,
            padded=padded,
            seed=seed,
            limits=bench.Limits(first, each),
            on_run=lambda name, way: on_run(f"{name}, {way}"),
        )
    report["model"]["name"] = name
    ending.record(report)
    if timeline is not None:
        timeline.write_text(plots.schedule(report["timeline"]), "utf-8")
    ending.show(report, views.tables(report), views.failures(report))
