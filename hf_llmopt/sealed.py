"""Files of tensors that are either whole or not there: safetensors with a checksum, renamed once they are written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from errno import ENOENT
from hashlib import blake2b
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a file with a checksum under a temporary name and rename it; returns its size."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sealed = {**metadata, "checksum": _checksum(tensors, metadata)}
    data = safetensors.torch.save(tensors, sealed)
    if not path.parent.is_dir():  # else the error would name the temporary file
        raise FileNotFoundError(ENOENT, f"There is no such folder to write {path.name!r} in", str(path.parent))
    handle, temporary = tempfile.mkstemp(".tmp", f"{path.stem}.", path.parent)  # readable by its owner only
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(data)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write` wrote.

    Raises:
        ValueError: The file is damaged, or something else.
        OSError: It cannot be read.
    """
    data = path.read_bytes()  # not mapped: a file that shrinks under a mapping ends the process
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata: dict[str, Any] = header.get("__metadata__", {})
        checksum = metadata.pop("checksum", None)
        tensors = safetensors.torch.load(data)
        intact = checksum is None or checksum == _checksum(tensors, metadata)
    except Exception as error:  # whatever a parser says about foreign bytes
        raise ValueError(f"it cannot be parsed: {error!r}") from error
    if checksum is None:
        raise ValueError("it has no checksum, so another program wrote it")
    if not intact:
        raise ValueError("its checksum is wrong")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = blake2b(json.dumps(sorted(metadata.items())).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
