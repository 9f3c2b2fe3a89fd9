"""Blocks that are quantized already, in a folder, so that a calibration that was stopped goes on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidOption
from ..kernels.arguments import Grid
from ..sealed import read, write

if TYPE_CHECKING:
    from .blocks import Block

FORMAT = "hf_llmopt block 3"
SAMPLE = 64  # elements of each parameter that tell models apart


class Finished:
    """One file per block, named by what its grids depend on.

    Args:
        folder: Made if it is not there.
        key: See `fingerprint`.

    Raises:
        InvalidOption: The folder cannot be made, or not be written.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError:  # a file stands in its place, say
            writable = False
        if not writable:
            raise InvalidOption(
                f"QuantizationConfig(resume={str(folder)!r}) is no folder that this process may write, nor can it be "
                "made. Name another one, or leave it out."
            )
        self.key = key

    def path(self, block: Block) -> Path:
        """Where a block's file is, or would be."""
        return self.folder / f"{self.key[:16]}-{block.name}.safetensors"

    def save(self, block: Block, grids: Mapping[str, Grid]) -> None:
        """Store a block's grids, and what else was changed in it."""
        stored = {f"assigned/{name}": value for name, value in block.assigned.items()}
        for name, grid in grids.items():
            tensors = {"codes": grid.codes, "scales": grid.scales, "zeros": grid.zeros, "index": grid.index}
            stored |= {f"{part}/{name}": tensor for part, tensor in tensors.items() if tensor is not None}
        bits = json.dumps({name: grid.bits for name, grid in grids.items()})
        about = {"format": FORMAT, "key": self.key, "bits": bits, "notes": json.dumps(block.notes)}
        write(self.path(block), {name: tensor.cpu() for name, tensor in stored.items()}, about)

    def load(self, block: Block) -> dict[str, Grid] | None:
        """A block's grids, on its device, and the rest put in its place; `None` if there is no file, or a wrong one."""
        try:
            stored, about = read(self.path(block))
            if (about.get("format"), about.get("key")) != (FORMAT, self.key):
                raise ValueError("it belongs to another calibration")
            bits = json.loads(about["bits"])
            if bits.keys() != block.products.keys():
                raise ValueError("it has other modules")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warnings.warn(
                f"llmopt: {self.path(block)} is ignored, and its block quantized again ({error}).",
                UserWarning,
                stacklevel=3,
            )
            return None
        block.notes = json.loads(about["notes"])
        for name, value in stored.items():
            if name.startswith("assigned/"):
                block.assign(name.removeprefix("assigned/"), value)

        device = next(block.module.parameters()).device

        def part(kind: str, name: str) -> Any:
            tensor = stored.get(f"{kind}/{name}")
            return None if tensor is None else tensor.to(device)

        return {
            name: Grid(part("codes", name), part("scales", name), part("zeros", name), bits[name], part("index", name))
            for name in block.products
        }

    def clear(self) -> None:
        """Remove the files of this calibration, and those that a killed process began."""
        for path in self.folder.glob(f"{self.key[:16]}-*"):
            path.unlink(missing_ok=True)


def fingerprint(model: PreTrainedModel, tokens: Tensor, chosen: Mapping[str, nn.Module], settings: str) -> str:
    """A digest of what grids depend on: config, a sample of each weight, tokens, names and settings.

    Offloaded weights count by name and shape only.
    """
    digest = blake2b(f"{FORMAT} {settings} {sorted(chosen)} {tuple(tokens.shape)}".encode(), digest_size=16)
    digest.update(model.config.to_json_string().encode())
    digest.update(tokens.cpu().contiguous().numpy().data)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            places = torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat)), device="cpu", dtype=torch.float64).long()
            digest.update(flat[places.to(flat.device)].float().cpu().numpy().data)
    return digest.hexdigest()
