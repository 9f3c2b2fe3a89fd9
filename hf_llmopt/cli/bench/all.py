"""`hf-llmopt bench all`: every part alone, the presets and all combinations, against stock."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from .. import ui
from ..command import Device, Dtype, UserError
from .options import (
    Model,
    Plots,
    Saved,
    Seed,
    Shape,
    load_or_build,
    read_report,
    require_known,
)
from .shown import Ending, ends


@ends
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the report in --output, where a run of the same was ended.")
    ] = False,
    saved: Saved = None,
    plots: Plots = None,
    *,
    ending: Ending,
) -> None:
    """Measure every part alone, the presets, and all combinations, against stock transformers.

    The matrix: weights, pages, prompt cache, speculation, batching. Speed, memory and time to first token of each stand
    beside the tokens or the quality of the same run. With --output what was measured is written as it comes. Exits with
    1 if tokens differ or quality misses its bound.
    """
    from hf_llmopt.bench import all as bench
    from hf_llmopt.bench import all_plan, all_tables
    from hf_llmopt.bench import slide as drawing

    ending.require_folders(plots)
    require_known("section", only, bench.SECTIONS)
    if resume and ending.output is None:
        raise UserError("--resume goes on with the report in a file: give --output FILE too")
    if saved is not None:
        report = read_report(saved, "all")
    else:
        begun = ending.output if resume else None
        former = read_report(begun, "all") if begun is not None and begun.exists() else None
        loaded, texts, name = load_or_build(model, shape, dtype, device, seed)
        own = str(loaded.dtype).removeprefix("torch.")
        first: dict[str, Any] = {own: loaded}
        del loaded

        def load(wanted: str) -> Any:
            return first.pop(wanted, None) or load_or_build(model, shape, wanted, device, seed)[0]

        source = all_plan.Source(name, load, own, texts, seed)
        plan = all_plan.Plan() if name == "demo" else all_plan.in_small(all_plan.Plan())
        plan = all_plan.in_miniature(plan) if ending.quick else plan
        plan = replace(plan, repeats=repeat) if repeat is not None else plan

        def keep(report: dict[str, Any]) -> None:
            if ending.output is not None:
                ui.save(ending.output, {**report, "quick": ending.quick})

        sections = only or bench.SECTIONS
        with ui.progress("all", bench.runs_of(plan, own, sections, former)) as on_run:
            report = bench.bench(source, plan, only=sections, former=former, keep=keep, on_run=on_run)
        ending.record(report)
    if plots is not None:
        for name, theme in (("all", "light"), ("all-dark", "dark")):
            (plots / f"{name}.svg").write_text(drawing.slide(report, theme), "utf-8")
    if ending.markdown and not ending.json:
        ui.say(all_tables.page(report))
        raise typer.Exit(0 if report["passed"] else 1)
    ending.show(report, all_tables.tables(report), bench.failures(report))
    if not ending.json:
        for line in all_tables.verdicts(report):
            ui.say(line)
