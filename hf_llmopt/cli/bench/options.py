"""What the benchmarks' commands have in common before they measure: options, and what these stand for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..command import UserError
from ..texts import read_text

Model = Annotated[
    str | None, typer.Option(help="A folder, a name on the hub, or `demo`, the embedded model, which is the default.")
]
Shape = Annotated[
    str | None, typer.Option(metavar="NAME", help="Instead of a model: this shape, 0.5b say, with random weights.")
]
Repeat = Annotated[int, typer.Option(min=1, help="Timed runs of each way, interleaved.")]
Seed = Annotated[int, typer.Option(help="Of whatever is drawn: prompts, lengths, random weights.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small and few of all, to see that it works; no figure counts.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")]
Output = Annotated[Path | None, typer.Option(help="Also write the JSON report to this file.")]
Plots = Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw pictures into this folder, SVG.")]
Saved = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Measure nothing: show the report in this file.")
]


def require_folders(*folders: Path | None) -> None:
    """Refuse to measure for nothing.

    Raises:
        UserError: A folder that is to be written to does not exist, or may not be written to.
    """
    for folder in folders:
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder {str(folder)!r} to write to")
        if folder is not None and not os.access(folder, os.W_OK):
            raise UserError(f"the folder {str(folder)!r} may not be written to")


def parent(path: Path | None) -> Path | None:
    """The folder of a file, if there is to be one.

    Raises:
        UserError: It is a folder itself.
    """
    if path is not None and path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; name a file in it")
    return None if path is None else path.parent


def read_report(path: Path, *benches: str) -> dict[str, Any]:
    """A report of one of these benchmarks, which can be shown.

    Raises:
        InvalidOption: It is none, or lacks what is shown.
        UserError: There is no such file, or no text in it.
    """
    from hf_llmopt.bench import pages

    report = pages.readable(read_text(path), path, benches)
    if not isinstance(report.get("passed"), bool):
        raise UserError(f'{path} does not say whether it "passed": it is not what --output wrote')
    return report


def require_known(what: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    """Refuse names that do not exist.

    Raises:
        InvalidOption: One does not; the message lists those that do.
    """
    from hf_llmopt.errors import unknown

    allowed = list(known)
    for name in names or ():
        if name not in allowed:
            raise unknown(what, name, allowed)


def chosen(what: str, names: list[str] | None, known: Mapping[str, Any]) -> list[Any]:
    """What the names stand for, all by default.

    Raises:
        InvalidOption: As `require_known`.
    """
    require_known(what, names, known)
    return [known[name] for name in names or known]


def meet(device: str | None) -> tuple[int, int]:
    """This process's rank and how many there are, which meet here; 0 and 1 unless torchrun started them."""
    import torch

    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if ranks > 1:
        gpus = torch.cuda.is_available() and device != "cpu"
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if gpus else "gloo")
    return rank, ranks


def load_or_build(
    model: str | None, shape: str | None, dtype: str, device: str | None, seed: int, ranks: int = 1
) -> tuple[Any, list[list[int]] | None, str]:
    """The model that is measured, sharded over `ranks` processes.

    Returns:
        It, the texts its prompts are cut from, `None` for random ids, and its name in a report.

    Raises:
        typer.BadParameter: Both a model and a shape were asked for.
    """
    import torch

    from hf_llmopt.bench.workloads import build, held_out_ids

    from ..models import load as load_model
    from ..models import parse_dtype, usable

    if ranks > 1 and shape is None:
        raise UserError("under torchrun the model that is measured is a --shape")
    if shape is None:
        name = "demo" if model is None else model
        loaded, tokenizer = load_model(name, dtype, device)
        return loaded, held_out_ids(tokenizer), name
    if model is not None:
        raise typer.BadParameter(
            "a shape stands for a model with random weights; give --model or --shape, not both", param_hint="--shape"
        )
    wanted = parse_dtype(dtype)
    if not isinstance(wanted, torch.dtype):
        raise UserError("random weights have no stored type: --shape needs another --dtype than auto")
    return build(shape, wanted, seed, device=usable(device), ranks=ranks), None, f"shape {shape}, random weights"
