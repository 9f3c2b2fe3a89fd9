"""Loading a model by the name that a user typed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ui
from .command import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(name: str, dtype: str = "auto", device: str | None = None, llmopt: Any = False) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer.

    Args:
        name: `demo`, a folder, or a name on the hub.
        dtype: One of `DTYPES`.
        device: Where to; a GPU by default if there is one.
        llmopt: The keyword of `from_pretrained`.

    Raises:
        UserError: There is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from hf_llmopt.errors import LLMOptError

    wanted = parse_dtype(dtype)
    if not ui.talks():
        logging.disable_progress_bar()
    path = _path(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=wanted, llmopt=llmopt)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except LLMOptError:
        raise
    except (OSError, ValueError, ImportError) as error:  # no such model, an unknown architecture, a missing package
        raise UserError(f"cannot load {name!r}: {ui.first_line(error)}") from error
    return place(model.eval(), device), tokenizer


def place(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """Move a model to a device; a GPU by default if there is one.

    Raises:
        UserError: torch cannot use the device.
    """
    model.to(usable(device))  # type: ignore[arg-type]  # transformers' wrapper loses the signature
    return model


def usable(device: str | None) -> str:
    """A device that torch can use; a GPU by default if there is one.

    Raises:
        UserError: torch cannot use the device.
    """
    import torch

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # a name torch does not know; torch without CUDA
        raise UserError(f"cannot use device {where!r}: {ui.first_line(error)}") from error
    return where


def parse_dtype(name: str) -> torch.dtype | str:
    """The torch type of a name; `"auto"` stays.

    Raises:
        UserError: There is no such type.
    """
    import torch

    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} does not exist. Allowed: {', '.join(DTYPES)}.")
    return name if name == "auto" else getattr(torch, name)


def _path(name: str) -> str:
    """A folder or hub name that `from_pretrained` takes; says plainly that a folder does not exist."""
    if name == "demo":
        from hf_llmopt import demo

        path = demo.path()
        if not (path / "config.json").is_file():
            raise UserError("the embedded model's weights are not installed; run `python -m hf_llmopt.demo.train`")
        return str(path)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"the folder {name!r} has no config.json: it is not a model that transformers saved")
        return str(path)
    if path.is_absolute() or name.startswith(("~", ".")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name!r}")
    return name
