"""`hf-llmopt bench all`: every part alone, the presets and all combinations, against stock."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from .. import ui
from ..command import Device, Dtype, Json, UserError
from .options import (
    Markdown,
    Model,
    Output,
    Plots,
    Quick,
    Saved,
    Seed,
    Shape,
    load_or_build,
    parent,
    read_report,
    require_folders,
    require_known,
)
from .shown import record, show


def every(
    model: Model = None,
    shape: Shape = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="SECTION", help="cases, quality or matrix; may be repeated. All by default."),
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds, interleaved; 5 by default, 3 of larger models.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Seed = 0,
    quick: Quick = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the report in --output, where a run of the same was ended.")
    ] = False,
    markdown: Markdown = False,
    output: Output = None,
    saved: Saved = None,
    plots: Plots = None,
    json: Json = False,
) -> None:
    """Measure every part alone, the presets, and all combinations, against stock transformers.

    The matrix: weights, pages, prompt cache, speculation, batching. Speed, memory and time to first token of each stand
    beside the tokens or the quality of the same run. With --output what was measured is written as it comes. Exits with
    1 if tokens differ or quality misses its bound.
    """
    from hf_llmopt.bench import all as bench
    from hf_llmopt.bench import all_plan, all_tables
    from hf_llmopt.bench import slide as drawing

    require_folders(parent(output), plots)
    require_known("section", only, bench.SECTIONS)
    if resume and output is None:
        raise UserError("--resume goes on with the report in a file: give --output FILE too")
    if saved is not None:
        report = read_report(saved, "all")
    else:
        former = read_report(output, "all") if resume and output is not None and output.exists() else None
        loaded, texts, name = load_or_build(model, shape, dtype, device, seed)
        own = str(loaded.dtype).removeprefix("torch.")
        first: dict[str, Any] = {own: loaded}
        del loaded

        def load(wanted: str) -> Any:
            return first.pop(wanted, None) or load_or_build(model, shape, wanted, device, seed)[0]

        source = all_plan.Source(name, load, own, texts, seed)
        plan = all_plan.Plan() if name == "demo" else all_plan.in_small(all_plan.Plan())
        plan = all_plan.in_miniature(plan) if quick else plan
        plan = replace(plan, repeats=repeat) if repeat is not None else plan

        def keep(report: dict[str, Any]) -> None:
            if output is not None:
                ui.save(output, {**report, "quick": quick})

        sections = only or bench.SECTIONS
        with ui.progress("all", bench.runs_of(plan, own, sections, former)) as on_run:
            report = bench.bench(source, plan, only=sections, former=former, keep=keep, on_run=on_run)
        record(report, output, quick)
    if plots is not None:
        for name, theme in (("all", "light"), ("all-dark", "dark")):
            (plots / f"{name}.svg").write_text(drawing.slide(report, theme), "utf-8")
    if markdown and not json:
        ui.say(all_tables.page(report))
        raise typer.Exit(0 if report["passed"] else 1)
    show(report, all_tables.tables(report), bench.failures(report), json, markdown)
    if not json:
        for line in all_tables.verdicts(report):
            ui.say(line)
