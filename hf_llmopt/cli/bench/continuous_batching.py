"""`hf-llmopt bench continuous_batching`: requests of different lengths, against stock."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import ui
from ..command import Device, Dtype, Json, UserError
from .kv_cache import load_or_build
from .shown import show


def continuous_batching(
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a name on the hub, or `demo`, the embedded model, which is the default."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="0.5b", help="Instead of a model: this shape with random weights.")
    ] = None,
    load_: Annotated[
        list[str] | None,
        typer.Option(
            "--load",
            help="random-256, ragged-16, sharegpt or nano-vllm; may be repeated. By default all but the last. The "
            "first one is also run at several request rates.",
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each way, interleaved.")] = 3,
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
    seed: Annotated[int, typer.Option(help="Of prompts, lengths, arrivals and random weights.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few short requests, to see that it works; no figure counts.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")] = False,
    timeline: Annotated[Path | None, typer.Option(help="Draw the recorded schedule into this SVG file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON report to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure requests that come and go, against a loop of stock `generate` and stock's own continuous batching.

    Throughput, and latency at several request rates. Greedy, tokens compared with stock `generate` in the same runs.
    Says nothing about speed and exits with 1 if tokens differ.
    """
    from hf_llmopt.bench import continuous_batching as cb
    from hf_llmopt.errors import unknown

    if model is not None and shape is not None:
        raise typer.BadParameter(
            "a shape stands for a model with random weights; give --model or --shape, not both", param_hint="--shape"
        )
    for path in (output, timeline):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"there is no folder {str(path.parent)!r} to write to")
    for name in load_ or []:
        if name not in cb.LOADS_BY_NAME:
            raise unknown("load", name, cb.LOADS_BY_NAME)
    loaded, texts = load_or_build("demo" if model is None else model, shape, dtype, device, seed)
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", 2**20)
    named = [cb.LOADS_BY_NAME[name] for name in load_ or cb.DEFAULT]
    chosen = list(cb.QUICK) if quick else [cb.in_miniature(item, limit) for item in named]
    with ui.progress("continuous_batching", cb.runs_of(chosen, repeat)) as on_run:
        report = cb.bench(
            loaded,
            chosen,
            texts=texts,
            repeats=repeat,
            padded=padded,
            seed=seed,
            limits=cb.Limits(first, each),
            on_run=lambda name, way: on_run(f"{name}, {way}"),
        )
    report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    report["quick"] = quick
    report["model"]["name"] = f"shape {shape}, random weights" if shape else model or "demo"
    if output is not None:
        ui.save(output, report)
    if timeline is not None:
        timeline.write_text(cb.svg(report["timeline"]), "utf-8")
    if quick:
        ui.talk("--quick: a few short requests, to see that it works; none of these figures counts")
    show(report, cb.tables(report), cb.failures(report), json, markdown)
