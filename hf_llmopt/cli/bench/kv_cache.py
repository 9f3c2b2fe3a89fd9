"""`hf-llmopt bench kv_cache`: the paged cache against no cache and stock's cache."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import ui
from ..command import Device, Dtype, Json, UserError
from .shown import show

if TYPE_CHECKING:
    from hf_llmopt.bench.workloads import Workload


def kv_cache(
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
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each way, interleaved.")] = 5,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and of random weights.")] = 0,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs", help="Every workload once more with CUDA graphs; also how long reading the weights takes."
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few short prompts, to see that it works; no figure counts.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON report to this file.")] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --long: also draw a picture into this folder, SVG.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure ragged batches with the paged cache, with stock's cache and without a cache.

    Greedy, all rows run to the end, every way interleaved with the others, tokens compared in the same runs. Says
    nothing about speed and exits with 1 if tokens differ.
    """
    from hf_llmopt.bench import kv_cache as kv
    from hf_llmopt.bench import report as reports

    if model is not None and shape is not None:
        raise typer.BadParameter(
            "a shape stands for a model with random weights; give --model or --shape, not both", param_hint="--shape"
        )
    for folder in (output.parent if output is not None else None, plots):
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder {str(folder)!r} to write to")
    if eviction and not long:
        raise UserError("--eviction is a part of --long: give both")
    if long:
        if model is not None or shape is not None or workload:
            raise UserError("--long has models and contexts of its own: leave out --model, --shape and --workload")
        if eviction:
            _eviction(seed, quick, markdown, output, json)
        else:
            _long(repeat, seed, quick, markdown, output, plots, json)
        return
    model = "demo" if model is None else model
    chosen = _workloads(
        kv.QUICK if quick else kv.WORKLOADS, workload, all_of_them=quick or (model == "demo" and not shape)
    )
    loaded, texts = load_or_build(model, shape, dtype, device, seed)
    ways = sum(len(kv.ways_of(item, replayed)) for item in chosen for replayed in [False, True][: 1 + graphs])
    with ui.progress("kv_cache", ways * (repeat + 1)) as on_run:
        report = kv.bench(
            loaded,
            chosen,
            texts=texts,
            repeats=repeat,
            seed=seed,
            graphs=graphs,
            on_run=lambda name, way: on_run(f"{name}, {way}"),
        )
    report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    report["quick"] = quick
    report["model"]["name"] = f"shape {shape}, random weights" if shape else model
    if output is not None:
        ui.save(output, report)
    if quick:
        ui.talk("--quick: a few short prompts, to see that it works; none of these figures counts")
    show(report, [reports.table(report)], reports.failures(report), json, markdown)


def _long(
    repeat: int, seed: int, quick: bool, markdown: bool, output: Path | None, plots: Path | None, json: bool
) -> None:
    from transformers.utils import logging

    from hf_llmopt.bench import kv_cache_long as kv
    from hf_llmopt.bench import plots as drawings
    from hf_llmopt.kernels import cpu

    if not cpu.available():
        raise UserError(f"--long measures the C kernels, which cannot run: {cpu.why_not()}")
    if not ui.talks():
        logging.disable_progress_bar()
    with ui.progress("kv_cache --long", kv.steps()) as on_run:
        report = kv.bench(repeat, seed, quick, on_run)
    report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    if output is not None:
        ui.save(output, report)
    if plots is not None:
        (plots / "kv_cache-long.svg").write_text(drawings.page_formats(report), "utf-8")
    show(report, kv.tables(report), kv.failures(report), json, markdown)


def _eviction(seed: int, quick: bool, markdown: bool, output: Path | None, json: bool) -> None:
    from hf_llmopt.bench import eviction

    loaded, texts = load_or_build("demo", None, "float32", None, seed)
    assert texts is not None
    sizes: dict[str, Any] = {"rows": 4, "following": 16, "ratios": (0.25,)} if quick else {}
    with ui.progress("kv_cache --long --eviction", eviction.cases(sizes.get("ratios", eviction.RATIOS))) as on_run:
        report = eviction.bench(loaded, texts, seed=seed, on_run=on_run, **sizes)
    report["command"] = shlex.join(["hf-llmopt", *sys.argv[1:]])
    report["quick"] = quick
    if output is not None:
        ui.save(output, report)
    if quick:
        ui.talk("--quick: a few prompts, to see that it works; none of these figures counts")
    show(report, [eviction.table(report)], eviction.failures(report), json, markdown)


def _workloads(known: tuple[Workload, ...], names: list[str] | None, all_of_them: bool) -> list[Workload]:
    from hf_llmopt.bench.kv_cache import WITHOUT_CACHE
    from hf_llmopt.errors import unknown

    by_name = {item.name: item for item in known}
    for name in names or []:
        if name not in by_name:
            raise unknown("workload", name, by_name)
    if names:
        return [by_name[name] for name in names]
    return [item for item in known if all_of_them or item.name not in WITHOUT_CACHE]


def load_or_build(
    model: str, shape: str | None, dtype: str, device: str | None, seed: int
) -> tuple[Any, list[list[int]] | None]:
    """The model, and the texts its prompts are cut from, `None` for random ids."""
    import torch

    from hf_llmopt.bench.workloads import build, held_out_ids

    from ..models import load as load_model
    from ..models import parse_dtype, usable

    if shape is None:
        loaded, tokenizer = load_model(model, dtype, device)
        return loaded, held_out_ids(tokenizer)
    wanted = parse_dtype(dtype)
    if not isinstance(wanted, torch.dtype):
        raise UserError("random weights have no stored type: --shape needs another --dtype than auto")
    return build(shape, wanted, seed, device=usable(device)), None
