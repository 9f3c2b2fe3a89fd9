"""`hf-llmopt bench kv_cache`: the paged cache against no cache and stock's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import ui
from ..command import Device, Dtype, UserError
from .options import (
    Model,
    Repeat,
    Seed,
    Shape,
    chosen,
    load_or_build,
    meet,
)
from .shown import Ending, ends


@ends
def kv_cache(
    model: Model = None,
    shape: Shape = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="batch-1, batch-8, batch-16 or long; may be repeated. By default all of them, but not long (512 "
            "tokens, also without a cache) for other models than the embedded one."
        ),
    ] = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Instead: bfloat16, int8, fp8 and int4 pages at a context of 8,192 tokens: perplexity of the embedded "
            "model, memory, error, speed of the shape 0.5b.",
        ),
    ] = False,
    eviction: Annotated[
        bool,
        typer.Option(
            "--eviction",
            help="With --long: instead of that, what eviction costs: recall and perplexity of the embedded model by "
            "method and share that is kept.",
        ),
    ] = False,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Instead, on a GPU: pages in host memory beside pages on the device and stock's offloaded cache, in "
            "bfloat16 and int8, of the shape 8b-llama or another --shape.",
        ),
    ] = False,
    repeat: Repeat = 5,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Every workload once more with graphs=True; a GPU replays graphs anyway where it can.",
        ),
    ] = False,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --long: also draw a picture into this folder, SVG.")
    ] = None,
    *,
    ending: Ending,
) -> None:
    """Measure ragged batches with the paged cache, with stock's cache and without a cache.

    Greedy, all rows run to the end, every way interleaved with the others, tokens compared in the same runs. Says
    nothing about speed and exits with 1 if tokens differ. Under torchrun a --shape is sharded over the processes.
    """
    from hf_llmopt.bench import kv_cache as kv
    from hf_llmopt.bench import report as reports

    ending.require_folders(plots)
    if eviction and not long:
        raise UserError("--eviction is a part of --long: give both")
    if offload:
        if long or model is not None or workload:
            raise UserError("--offload has contexts of its own: leave out --long, --model and --workload")
        _offload(shape or "8b-llama", repeat, seed, ending)
        return
    if long:
        if model is not None or shape is not None or workload:
            raise UserError("--long has models and contexts of its own: leave out --model, --shape and --workload")
        if eviction:
            _eviction(seed, ending)
        else:
            _long(repeat, seed, plots, ending)
        return
    known = {item.name: item for item in (kv.QUICK if ending.quick else kv.WORKLOADS)}
    if not (workload or ending.quick or (model in (None, "demo") and shape is None)):
        workload = [name for name in known if name not in kv.WITHOUT_CACHE]
    workloads = chosen("workload", workload, known)
    rank, ranks = meet(device)
    loaded, texts, name = load_or_build(model, shape, dtype, device, seed, ranks)
    ways = sum(len(kv.ways_of(item, replayed)) for item in workloads for replayed in [False, True][: 1 + graphs])
    with ui.progress("kv_cache", ways * (repeat + 1)) as on_run:
        report = kv.bench(
            loaded,
            workloads,
            texts=texts,
            repeats=repeat,
            seed=seed,
            graphs=graphs,
            on_run=lambda name, way: on_run(f"{name}, {way}"),
        )
    if rank:
        return  # the first one tells
    report["model"]["name"] = name
    ending.record(report)
    ending.show(report, [reports.table(report)], reports.failures(report))


def _long(repeat: int, seed: int, plots: Path | None, ending: Ending) -> None:
    from transformers.utils import logging

    from hf_llmopt.bench import kv_cache_long as kv
    from hf_llmopt.bench import plots as drawings
    from hf_llmopt.kernels import cpu

    if not cpu.available():
        raise UserError(f"--long measures the C kernels, which cannot run: {cpu.why_not()}")
    if not ui.talks():
        logging.disable_progress_bar()
    with ui.progress("kv_cache --long", kv.steps()) as on_run:
        report = kv.bench(repeat, seed, ending.quick, on_run)
    ending.record(report)
    if plots is not None:
        (plots / "kv_cache-long.svg").write_text(drawings.page_formats(report), "utf-8")
    ending.show(report, kv.tables(report), kv.failures(report))


def _offload(shape: str, repeat: int, seed: int, ending: Ending) -> None:
    import torch

    from hf_llmopt.bench import offload as kv

    if not torch.cuda.is_available():
        raise UserError("--offload measures the way between host and GPU, and found no CUDA device")
    with ui.progress("kv_cache --offload", kv.steps(ending.quick)) as on_run:
        report = kv.bench(shape, repeat, seed, ending.quick, on_run)
    ending.record(report)
    ending.show(report, kv.tables(report), kv.failures(report))


def _eviction(seed: int, ending: Ending) -> None:
    from hf_llmopt.bench import eviction

    loaded, texts, _ = load_or_build("demo", None, "float32", None, seed)
    assert texts is not None
    sizes: dict[str, Any] = {"rows": 4, "following": 16, "ratios": (0.25,)} if ending.quick else {}
    with ui.progress("kv_cache --long --eviction", eviction.cases(sizes.get("ratios", eviction.RATIOS))) as on_run:
        report = eviction.bench(loaded, texts, seed=seed, on_run=on_run, **sizes)
    ending.record(report)
    ending.show(report, [eviction.table(report)], eviction.failures(report))
