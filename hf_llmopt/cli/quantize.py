"""`hf-llmopt quantize`: write a model's weights in fewer bits, in a standard format."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui
from .command import Device, Dtype, Json, Model, UserError
from .texts import read_text

if TYPE_CHECKING:
    from hf_llmopt.bench.quality import Perplexity

EVALUATED = 16_384  # tokens of the text that --eval measures on


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; made whole at the end, or not at all.")],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="int4, int8, fp8; calibrated: gptq, awq, smoothquant.")
    ] = "int4",
    bits: Annotated[int | None, typer.Option(help="Of a code: 2, 3, 4 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 for all of an output.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Without zeros, or with them.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A UTF-8 file to calibrate on; by default documentation that Python carries.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences of the calibration set.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    skip: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A module to leave; may be repeated.")] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="Of the output head, 4 or 8, while --eval measures; files keep it as it is.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep finished blocks here, so that a stopped run goes on.")
    ] = None,
    evaluate: Annotated[bool, typer.Option("--eval", help="Measure the perplexity before and after.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that holds something.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Quantize a model and save it with its tokenizer, for this package and for others that read the format."""
    from hf_llmopt.config import LLMOptConfig, QuantizationConfig
    from hf_llmopt.errors import CalibrationFailed

    asked = QuantizationConfig(
        method, bits=bits, group_size=group_size, symmetric=symmetric, skip=tuple(skip or ()), head_bits=head_bits,
        calibration=None if calibration is None else [read_text(calibration)], samples=samples, length=length,
        resume=resume,
    )  # fmt: skip
    _check(model, out, force)

    from .models import load

    before: Perplexity | None = None
    if evaluate:
        full, tokenizer = load(model, dtype, device)
        before = _perplexity(full, tokenizer)
        del full
        gc.collect()  # a model refers to itself; the next one comes into the same memory
    try:
        loaded, tokenizer = load(model, dtype, device, LLMOptConfig(quantization=asked))
    except CalibrationFailed as error:
        raise UserError(f"{error} Here: a longer text with --calibration, or a smaller --length.") from error
    made: Any = loaded
    if made.hf_quantizer.pre_quantized:
        raise UserError(f"{model!r} is quantized already; give the full-precision model")
    found = made.llmopt.quantization
    size_before = _full_bytes(loaded)
    with replacing(out) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "method": method,
        "quantization_config": found.config,
        "bytes_before": size_before,
        "bytes": size,
        "quantized": found.quantized,
        "quantized_bytes_before": found.bytes_before,
        "quantized_bytes": found.bytes,
        "skipped": found.skipped,
        "notes": found.notes,
    }
    if before is not None:
        after = _perplexity(loaded, tokenizer)
        ratio = after.over(before)
        report["perplexity"] = {
            "before": before.to_dict(), "after": after.to_dict(), "times": [ratio.value, ratio.low, ratio.high]
        }  # fmt: skip
    if json:
        ui.emit(report)
    else:
        _print(report)


def _check(model: str, out: Path, force: bool) -> None:
    """Refuse before anything is loaded what could not be written at the end."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; give a folder")
    if out.is_dir() and Path(model).expanduser().resolve() == out.resolve():
        raise UserError(f"{str(out)!r} is the folder of the model itself; give another one")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UserError(f"the folder {str(out)!r} is not empty; give another one, or --force to replace it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {str(out.parent)!r} to make {out.name!r} in")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place if nothing fails, and is removed else."""
    from safetensors import SafetensorError

    out = out.absolute()
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{state}") for state in ("new", "old"))
    try:
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    except SafetensorError as error:  # of a full disk, say
        raise UserError(f"{str(out)!r} could not be written: {error}") from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _full_bytes(model: Any) -> int:
    """Bytes of the model's weights in its number format, before it was quantized."""
    import copy

    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        full = type(model)._from_config(config, dtype=model.dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in full.parameters())


def _perplexity(model: Any, tokenizer: Any) -> Perplexity:
    from hf_llmopt.bench import quality
    from hf_llmopt.bench.sample import Sample
    from hf_llmopt.demo.corpus import held_out_texts

    sample = Sample.cut(model, tokenizer, held_out_texts(), tokens=EVALUATED)
    with ui.progress("perplexity", len(sample.windows)) as on_window:
        return quality.perplexity(model, sample, on_window)


def _print(report: dict[str, Any]) -> None:
    before, after = report["quantized_bytes_before"], report["quantized_bytes"]
    rows = [
        ["weights, MB", f"{report['bytes_before'] / 1e6:.1f}", f"{report['bytes'] / 1e6:.1f}"],
        ["of quantized modules", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}"],
    ]
    if "perplexity" in report:
        found = report["perplexity"]
        rows.append(["perplexity", *(f"{found[when]['perplexity']:.4f}" for when in ("before", "after"))])
        value, low, high = found["times"]
        rows.append(
            ["perplexity, times", "", f"{value:.4f}" + (f" [{low:.4f}, {high:.4f}]" if low is not None else "")]
        )
    ui.table(f"{report['model']} with {report['method']}", ["", "before", "after"], rows, 1)
    for kind, what in (("skipped", "skipped"), ("notes", "quantized, but")):
        reasons: dict[str, list[str]] = {}
        for name, why in report[kind].items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            ui.say(f"{what} {names[0]}{more}: {why}")
    ui.say(f"{len(report['quantized'])} modules quantized; written to {report['out']} (load it with llmopt=True)")
