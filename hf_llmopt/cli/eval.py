"""`hf-llmopt eval`: how well a model predicts a text, and how far it is from another one."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui
from .command import Device, Dtype, Json, Model, ModelCommand, UserError, keyword
from .texts import read_text

if TYPE_CHECKING:
    from hf_llmopt.bench.sample import Sample

app = typer.Typer(help="Measure the quality of a model.", no_args_is_help=True)

READER = "kv_cache"  # of the keyword's values the plainest: with any, quantized folders need no other package
HELD_OUT = "held-out part of Python's standard library"
Quantized = Annotated[
    str,
    typer.Option(
        "--llmopt",
        metavar="NAME|JSON",
        help='As `from_pretrained` takes it: int4, or {"quantization": {"method": "gptq", "bits": 3}}; false for none.',
    ),
]
Text = Annotated[
    Path | None, typer.Option(help=f"A UTF-8 file. By default the {HELD_OUT}, which the embedded model has not seen.")
]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of a window; by default 1024, if the model can.")]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens between two windows; by default half a window. Fewer: slower, exacter."),
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Stop after so many; by default the whole file, or 32768.")]


@app.callback()
def kinds() -> None:
    """Measure the quality of a model."""


@app.command("perplexity", cls=ModelCommand)
def perplexity(
    model: Model,
    text: Text = None,
    llmopt: Quantized = "false",
    context: Context = None,
    stride: Stride = None,
    tokens: Tokens = None,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Perplexity of a text under a sliding window, with its 95 % interval, and bits per byte."""
    wanted, texts = keyword(llmopt), _texts(text)

    from hf_llmopt.bench import quality

    from .models import load

    loaded, tokenizer = load(model, dtype, device, READER if wanted is False else wanted)
    sample = _cut(loaded, tokenizer, texts, text, context, stride, tokens)
    with ui.progress("perplexity", len(sample.windows)) as on_window:
        found = quality.perplexity(loaded, sample, on_window)
    report = {"model": model, "llmopt": llmopt, "dtype": _dtype(loaded), **_about(text, sample), **found.to_dict()}
    if json:
        ui.emit(report)
        return
    rows = [
        ["perplexity", str(found.estimate)],
        ["bits per byte", f"{found.bits_per_byte:.4f}"],
        ["tokens", f"{found.tokens:,}"],
        ["windows", f"{len(sample.windows):,}"],
    ]
    ui.table(f"{_name(model, wanted, llmopt)}, {_dtype(loaded)}: {report['text']}", ["", ""], rows, 1)
    _warn(sample)


@app.command("logits", cls=ModelCommand)
def logits(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model it should be like; by default itself without --llmopt."),
    ] = None,
    text: Text = None,
    llmopt: Quantized = "false",
    context: Context = None,
    stride: Stride = None,
    tokens: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 4096,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """How far a model's logits are from another's: KL divergence, same first choices, size of the differences.

    The other model's logits are written to a temporary folder, so that only one model is in memory at a time.
    """
    wanted, texts = keyword(llmopt), _texts(text)
    if wanted is False and against is None:
        raise UserError("there is nothing to compare with: give --llmopt, such as int4, or --against another model")
    if against is None and _only_exact(wanted):
        raise UserError(
            f"--llmopt {llmopt} changes neither weights nor the numbers in pages, so {model!r} cannot differ from "
            "itself; give --against another model"
        )
    reference = model if against is None else against

    from hf_llmopt.bench import quality

    from .models import load

    with TemporaryDirectory() as folder:
        loaded, tokenizer = load(reference, dtype, device, READER)
        if against is None and getattr(loaded.config, "quantization_config", None) and _only_format(wanted):
            raise UserError(
                f"{model!r} is quantized already, so it would be compared with itself; give --against the "
                "full-precision model"
            )
        sample = _cut(loaded, tokenizer, texts, text, context, stride, tokens)
        with ui.progress("logits", 2 * len(sample.windows)) as on_window:
            theirs = quality.recorded(_said(quality.logits(loaded, sample), on_window), sample, Path(folder))
            del loaded
            gc.collect()  # a model refers to itself
            loaded, _ = load(model, dtype, device, READER if wanted is False else wanted)
            found = quality.divergence(quality.logits(loaded, sample), theirs, sample, on_window)
    report = {
        "model": model, "llmopt": llmopt, "against": reference, "dtype": _dtype(loaded), **_about(text, sample),
        **found.to_dict(),
    }  # fmt: skip
    if json:
        ui.emit(report)
        return
    rows = [
        ["perplexity, times", str(found.perplexity)],
        ["KL divergence, nats", str(found.kl)],
        ["its 99 % quantile", f"{found.kl_99:.4g}"],
        ["same first choice", str(found.top1)],
        ["overlap", f"{found.overlap:.4g}"],
        ["difference of logits, RMS", f"{found.rms:.4g} (they spread by {found.spread:.4g})"],
        ["largest", f"{found.largest:.4g}"],
        ["tokens", f"{found.tokens:,}"],
        ["windows", f"{len(sample.windows):,}"],
    ]
    title = f"{_name(model, wanted, llmopt)}, against {reference}, {_dtype(loaded)}: {report['text']}"
    ui.table(title, ["", ""], rows, 1)
    _warn(sample)


def _only_exact(wanted: Any) -> bool:
    """Whether the keyword leaves every forward pass as it is."""
    from hf_llmopt.config import LLMOptConfig

    config = LLMOptConfig.parse(wanted)
    return config is None or config.exact


def _only_format(wanted: Any) -> bool:
    """Whether the keyword says no more than what quantized files hold anyway."""
    from hf_llmopt.config import LLMOptConfig

    config = LLMOptConfig.parse(wanted)
    asked = None if config is None else config.quantization
    return _only_exact(replace(config, quantization=None) if config else None) and not (
        asked is not None and (asked.names("head_bits") or asked.names("activations"))
    )


def _texts(path: Path | None) -> list[str]:
    if path is not None:
        return [read_text(path)]
    from hf_llmopt.demo.corpus import held_out_texts

    return held_out_texts()


def _cut(
    model: Any, tokenizer: Any, texts: list[str], path: Path | None, context: int | None, stride: int | None,
    tokens: int | None,
) -> Sample:  # fmt: skip
    from hf_llmopt.bench.sample import Sample

    tokens = 1 << 15 if tokens is None and path is None else tokens
    return Sample.cut(model, tokenizer, texts, context=context, stride=stride, tokens=tokens)


def _said(rows: Any, on_window: Any) -> Any:
    for window in rows:
        on_window("reference")
        yield window


def _about(path: Path | None, sample: Sample) -> dict[str, Any]:
    longest = max(len(window.ids) for window in sample.windows) - 1
    return {"text": str(path) if path else HELD_OUT, "context": longest, "windows": len(sample.windows)}


def _name(model: str, wanted: Any, llmopt: str) -> str:
    return model if wanted is False else f"{model}, {llmopt}"


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _warn(sample: Sample) -> None:
    if len(sample.windows) == 1:
        ui.warn("the text fills a single window, so there is no interval; give a longer text or a smaller --context")
