"""`hf-llmopt bench flash_attention`: our kernels over pages against torch's attention, on a GPU or the CPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import ui
from ..command import UserError
from .options import (
    Plots,
    Repeat,
    Saved,
    Seed,
    read_report,
    require_known,
)
from .shown import Ending, ends


@ends
def flash_attention(
    device: Annotated[
        str | None, typer.Option(metavar="cuda|cpu", help="Where; by default on a CUDA device if there is one.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="On the CPU: prompts, memory or decode; may be repeated. All by default."),
    ] = None,
    repeat: Repeat = 5,
    seed: Seed = 0,
    saved: Saved = None,
    plots: Plots = None,
    *,
    ending: Ending,
) -> None:
    """Measure prompts and decoding against torch's attention, on the CPU the memory of prompts too.

    Every figure stands beside the error against float64, or the tokens, of the same run. Exits with 1 if an error is
    larger than torch's, or tokens differ.
    """
    import torch

    from hf_llmopt.bench import flash_attention as on_gpu
    from hf_llmopt.bench import flash_attention_cpu as on_cpu
    from hf_llmopt.bench import plots as drawings
    from hf_llmopt.kernels import cpu

    ending.require_folders(plots)
    require_known("device", None if device is None else [device], ("cuda", "cpu"))
    require_known("part", only, on_cpu.PARTS)
    device = device or ("cuda" if torch.cuda.is_available() and not only else "cpu")
    report: dict[str, Any]
    if saved is not None:
        report = read_report(saved, "flash attention", "flash attention on a CPU")
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("found no CUDA device; --device cpu measures the CPU, --report FILE shows a saved report")
    elif device == "cuda":
        prefills = ((1, 1024, 1024), (1, 2048, 512)) if ending.quick else on_gpu.PREFILLS
        decodes = ((2, 4096),) if ending.quick else on_gpu.DECODES
        with ui.progress("flash_attention", len(prefills) + len(decodes)) as on_run:
            report = on_gpu.bench(prefills, decodes, seed, on_run)
    elif not cpu.available():
        raise UserError(f"the C kernels cannot run: {cpu.why_not()}")
    else:
        parts, size = only or on_cpu.PARTS, on_cpu.QUICK if ending.quick else on_cpu.Size()
        with ui.progress("flash_attention", on_cpu.steps(parts, size)) as on_run:
            report = on_cpu.bench(parts, size, repeat, seed, on_run)
    if saved is None:
        ending.record(report)
    if plots is not None and report.get("prompts"):
        (plots / "flash_attention-cpu.svg").write_text(drawings.prompts(report["prompts"]), "utf-8")
    measured = on_gpu if "device" in report else on_cpu
    ending.show(report, measured.tables(report), measured.failures(report))
