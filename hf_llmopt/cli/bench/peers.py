"""`hf-llmopt bench peers`: the same work on everything that is installed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import ui
from ..command import Dtype
from .options import Model, Repeat, Seed, Shape, load_or_build
from .shown import Ending, ends


@ends
def peers(
    model: Model = None,
    shape: Shape = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also stock's static cache under torch.compile, minutes to begin with.")
    ] = False,
    repeat: Repeat = 3,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    *,
    ending: Ending,
) -> None:
    """Measure stock transformers in all its modes, OpenVINO and llama.cpp if installed, and ours, on the CPU.

    The same shape, prompts and number of tokens, interleaved in one process. Says who is missing, and why. Exits with 1
    if our tokens are not stock's.
    """
    from hf_llmopt import demo
    from hf_llmopt.bench import peers as bench

    ending.require_folders()
    loaded, _, name = load_or_build(model, shape, dtype, "cpu", seed)
    draft: Any = demo.load(draft=True, dtype=loaded.dtype)[0] if name == "demo" else None
    works = bench.QUICK if ending.quick else bench.WORKS
    with ui.progress("peers", bench.runs_of(loaded, draft, works, repeat, compiled)) as on_run:
        report = bench.bench(loaded, draft, works, repeats=repeat, seed=seed, compiled=compiled, on_run=on_run)
    report["model"]["name"] = name
    ending.record(report)
    ending.show(report, bench.tables(report), report["reasons"])
