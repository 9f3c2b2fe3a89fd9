"""`hf-llmopt bench prompt_cache`: prompts that are found against prompts that are computed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import ui
from ..command import Device, Dtype, Json, UserError
from .kv_cache import load_or_build
from .shown import show

if TYPE_CHECKING:
    from hf_llmopt.bench.prompt_cache import Workload


def prompt_cache(
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a name on the hub, or `demo`, the embedded model, which is the default."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="0.5b", help="Instead of a model: this shape with random weights.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="prefix-0, prefix-50, prefix-90, long-prefix (2,000 tokens), chat or agent; may be repeated. All by "
            "default."
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each way, interleaved.")] = 5,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and of random weights.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few short prompts, to see that it works; no figure counts.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON report to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure the time to the first token of prompts whose beginning is found in memory, on disk, or not at all.

    Greedy, every way interleaved with the others, tokens compared in the same runs. Says nothing about speed and exits
    with 1 if tokens differ.
    """
    from hf_llmopt.bench import prompt_cache as pc
    from hf_llmopt.bench import report as reports

    if model is not None and shape is not None:
        raise typer.BadParameter(
            "a shape stands for a model with random weights; give --model or --shape, not both", param_hint="--shape"
        )
    model = "demo" if model is None else model
    if output is not None and not output.parent.is_dir():
        raise UserError(f"there is no folder {str(output.parent)!r} to write the report to")
    chosen = _workloads(pc.QUICK if quick else pc.WORKLOADS, workload)
    loaded, texts = load_or_build(model, shape, dtype, device, seed)
    with ui.progress("prompt_cache", sum(pc.runs_of(item, repeat) for item in chosen)) as on_run:
        report = pc.bench(
            loaded,
            chosen,
            texts=texts,
            repeats=repeat,
            seed=seed,
            on_run=lambda name, way: on_run(f"{name}, {way}"),
        )
    report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    report["quick"] = quick
    report["model"]["name"] = f"shape {shape}, random weights" if shape else model
    if output is not None:
        ui.save(output, report)
    if quick:
        ui.talk("--quick: a few short prompts, to see that it works; none of these figures counts")
    show(report, [pc.table(report)], reports.failures(report), json, markdown)


def _workloads(known: tuple[Workload, ...], names: list[str] | None) -> list[Workload]:
    from hf_llmopt.errors import unknown

    by_name = {item.name: item for item in known}
    for name in names or []:
        if name not in by_name:
            raise unknown("workload", name, by_name)
    return [by_name[name] for name in names] if names else list(known)
