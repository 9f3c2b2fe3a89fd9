"""`hf-llmopt bench serve`: the server under load, against `transformers serve`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import ui
from ..command import Device, Dtype, Llmopt, UserError, keyword
from .options import (
    Model,
    Plots,
    Repeat,
    Saved,
    Seed,
    Shape,
    chosen,
    load_or_build,
    read_report,
)
from .shown import Ending, ends

if TYPE_CHECKING:
    from hf_llmopt.bench.serve import Plan


@ends
def serve(
    model: Model = None,
    shape: Shape = None,
    llmopt: Llmopt = "true",
    part: Annotated[list[str] | None, typer.Option(help="rates or overhead; may be repeated. Both by default.")] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            min=1e-6, help="Requests per second; may be repeated. By default shares of what the server does at most."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests at each rate, and of the closed loop.")] = 64,
    groups: Annotated[int, typer.Option(min=1, help="Different texts that prompts begin with.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Of the closed loop that overhead is measured with.")] = 8,
    repeat: Repeat = 3,
    first: Annotated[float, typer.Option(min=0, help="Seconds to the first token that a user accepts.")] = 1.0,
    each: Annotated[float, typer.Option(min=0, help="Seconds per further token that a user accepts.")] = 0.1,
    stock: Annotated[bool, typer.Option(help="Also measure `transformers serve --continuous-batching`.")] = True,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    plots: Plots = None,
    saved: Saved = None,
    *,
    ending: Ending,
) -> None:
    """Measure the server: latencies and goodput at several request rates, and what HTTP costs above the engine.

    Requests come whether or not earlier ones were answered. Answers are compared with those of stock `generate`. Says
    nothing about speed and exits with 1 if they differ in float32.
    """
    from hf_llmopt.bench import plots as drawings
    from hf_llmopt.bench import serve as bench
    from hf_llmopt.bench import serve_load, serve_tables
    from hf_llmopt.bench.continuous_batching import Limits

    ending.require_folders(plots)
    if saved is not None:
        report = read_report(saved, "serve")
    else:
        plan = bench.Plan(
            serve_load.QUICK if ending.quick else serve_load.Load(requests, groups),
            tuple(rate or ()),
            Limits(first, each),
            clients,
            repeat,
            tuple(chosen("part", part, {name: name for name in bench.PARTS})),
            seed,
        )
        report = _measure(plan, model, shape, llmopt, stock, dtype, device)
        ending.record(report)
    if plots is not None and report["points"]:
        (plots / "serve.svg").write_text(drawings.served(report["points"]), "utf-8")
    ending.show(report, serve_tables.tables(report), report.get("reasons", ()))


def _measure(
    plan: Plan, model: str | None, shape: str | None, llmopt: str, stock: bool, dtype: str, device: str | None
) -> dict[str, Any]:
    """Save the model for both servers, and measure.

    Raises:
        UserError: There is nothing of ours to measure, or our server does not start.
    """
    from hf_llmopt import Engine, LLMOptConfig
    from hf_llmopt.bench import serve as bench
    from hf_llmopt.bench import serve_process
    from hf_llmopt.demo.corpus import held_out_texts

    from ..models import load, usable

    wanted = LLMOptConfig.parse(keyword(llmopt))
    if wanted is None:
        raise UserError("--llmopt false is stock transformers, which is measured beside ours anyway")
    where = usable(device)
    with TemporaryDirectory() as folder, TemporaryDirectory() as logs:
        built, _, name = load_or_build(model, shape, dtype, "cpu", plan.seed)
        tokenizer = load(model or "demo", dtype, "cpu")[1]
        if shape is not None:
            tokenizer = serve_process.stretched(tokenizer, built.config.vocab_size)
        built.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del built
        loaded, tokenizer = load(folder, dtype, where, wanted)
        commands = {bench.OURS: serve_process.ours(folder, dtype, where, llmopt)}
        if stock:
            commands[bench.THEIRS] = serve_process.theirs(folder, dtype, where, plan.load.requests)
        with Engine(loaded, wanted) as engine, ui.progress("serve", plan.runs) as on_run:
            try:
                report = bench.bench(
                    loaded,
                    engine,
                    tokenizer,
                    held_out_texts()[:24],
                    commands,
                    Path(logs),
                    folder,
                    plan,
                    lambda what, way: on_run(f"{what}, {way}"),
                )
            except serve_process.NoServer as error:
                raise UserError(f"hf-llmopt serve did not start: {error}") from error
    report["model"]["name"] = name
    report["llmopt"] = llmopt
    return report
