"""Loading a model by the name that a user typed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    model = load_model(name, dtype, llmopt=llmopt)
    return place(model, device), tokenizer(name)


def load_shard(name: str, dtype: str = "auto") -> PreTrainedModel:
    """Load the part of a model that belongs to this rank, of those that torch.distributed has made known.

    Raises:
        UserError: There is no such model, or it cannot be loaded or sharded.
    """
    from transformers.distributed import DistributedConfig

    return load_model(name, dtype, distributed_config=DistributedConfig(tp_plan="auto"))


def check_shards(name: str, ranks: int, device: str | None) -> None:
    """Refuse ranks that a model or this machine has no part for, before any of them is started.

    Args:
        name: `demo`, a folder, or a name on the hub.
        ranks: How many there are to be.
        device: As the user gave it; ranks choose theirs by themselves.

    Raises:
        UserError: There are fewer GPUs, or heads cannot be shared evenly, or there is no such model.
    """
    import torch
    from transformers import AutoConfig

    gpus = torch.cuda.device_count()
    if gpus and gpus < ranks:
        raise UserError(f"--tensor-parallel {ranks} needs a GPU for each rank, and this machine has {gpus}")
    if device not in (None, "cuda" if gpus else "cpu"):
        raise UserError(
            f"--device {device} is one device, and --tensor-parallel {ranks} takes as many as there are ranks; "
            "leave it out"
        )
    with _loading(name):
        config = AutoConfig.from_pretrained(_path(name)).get_text_config()
    for kind in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, kind, None)
        if heads is not None and heads % ranks:
            raise UserError(f"--tensor-parallel {ranks}: the model has {kind}={heads}, which cannot be shared evenly")


def tokenizer(name: str) -> Any:
    """A model's tokenizer.

    Raises:
        UserError: There is none.
    """
    from transformers import AutoTokenizer

    with _loading(name):
        return AutoTokenizer.from_pretrained(_path(name))


def load_model(name: str, dtype: str, **more: Any) -> PreTrainedModel:
    """Load a model, where transformers puts it; the rest goes to `from_pretrained`.

    Raises:
        UserError: There is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    wanted = parse_dtype(dtype)
    if not ui.talks():
        logging.disable_progress_bar()
    with _loading(name):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(_path(name), dtype=wanted, **more)
    return model.eval()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What can be wrong with a model's files becomes one line."""
    from safetensors import SafetensorError

    from hf_llmopt.errors import LLMOptError

    try:
        yield
    except LLMOptError:
        raise
    except (
        OSError,
        ValueError,
        ImportError,
        SafetensorError,
    ) as error:  # no model, no package, a torn file
        raise UserError(f"cannot load {name!r}: {ui.first_line(error)}") from error


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
