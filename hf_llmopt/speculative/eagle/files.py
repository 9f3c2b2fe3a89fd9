"""A drafter's files: its config and tensors, whichever way they are stored."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import cached_file

from ...errors import InvalidCheckpoint, InvalidOption

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a drafter, on the CPU.

    Args:
        name: Its folder, or its name on the hub.

    Raises:
        InvalidOption: There is no such drafter.
        InvalidCheckpoint: Its files are damaged, or some are missing.
    """
    config = find(name, "config.json")
    weights = next((path for file in WEIGHTS if (path := find(name, file)) is not None), None)
    if config is None or weights is None:
        missing = "config.json" if config is None else " nor ".join(WEIGHTS)
        raise InvalidOption(f"draft_model={name!r} is no drafter: it holds no {missing}.")
    try:
        options = json.loads(config.read_text("utf-8"))
        paths = [weights]
        if weights.name == INDEX:
            shards = sorted(set(json.loads(weights.read_text("utf-8"))["weight_map"].values()))
            paths = [path for shard in shards if (path := find(name, shard)) is not None]
            if len(paths) < len(shards):
                raise InvalidCheckpoint(f"draft_model={name!r}: {INDEX} names {shards}, and some are not there.")
        tensors: dict[str, Tensor] = {}
        for path in paths:
            bare = path.suffix == ".bin"
            tensors |= torch.load(path, "cpu", weights_only=True) if bare else safetensors.torch.load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, TypeError) as error:
        if isinstance(error, InvalidCheckpoint):
            raise
        raise InvalidCheckpoint(f"draft_model={name!r} cannot be read: {type(error).__name__}: {error}") from error
    return options, tensors


def find(name: str, file: str) -> Path | None:
    """A file of a model, downloaded if need be; `None` if it has no such file.

    Args:
        name: The model's folder, or its name on the hub.
        file: The file's name.

    Raises:
        InvalidOption: There is no such model.
    """
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise InvalidOption(
            f"{name!r} is neither a folder nor a name on the hub that can be reached: {error}"
        ) from error
    return None if found is None else Path(found)
