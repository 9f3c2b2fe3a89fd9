"""`hf-llmopt bench hops`: what is between a client and an engine, and between the ranks of a model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from .. import ui
from ..command import Dtype, UserError
from .options import Model, Repeat, Saved, read_report
from .shown import Ending, ends


@ends
def hops(
    model: Model = None,
    requests: Annotated[int, typer.Option(min=1, help="For one token, in each run.")] = 40,
    tokens: Annotated[int, typer.Option(min=2, help="Of answers that are streamed.")] = 64,
    repeat: Repeat = 5,
    dtype: Dtype = "float32",
    saved: Saved = None,
    *,
    ending: Ending,
) -> None:
    """Measure what a request and a token cost on the way: HTTP, Ray Serve (if it is installed), all-reduces.

    Exits with 1 if the text is another one on some way.
    """
    from hf_llmopt.bench import hops as bench
    from hf_llmopt.bench import hops_tables

    ending.require_folders()
    if saved is not None:
        report = read_report(saved, "hops")
    else:
        from hf_llmopt import Engine
        from hf_llmopt.bench import serve_process

        from ..models import load

        name = model or "demo"
        plan = bench.Plan(4, 8, 2, bench.SIZES[:1]) if ending.quick else bench.Plan(requests, tokens, repeat)
        loaded, tokenizer = load(name, dtype, "cpu")
        servers = bench.commands(serve_process.ours(name, dtype, "cpu", "true"))
        runs = plan.repeats * (1 + len(servers))
        with TemporaryDirectory() as logs, Engine(loaded) as engine, ui.progress("hops", runs) as on_run:
            try:
                report = bench.bench(engine, tokenizer, servers, name, Path(logs), plan, lambda way, *_: on_run(way))
            except serve_process.NoServer as error:
                raise UserError(f"a server did not start: {error}") from error
        ending.record(report)
    ending.show(report, hops_tables.tables(report), report.get("reasons", ()))
