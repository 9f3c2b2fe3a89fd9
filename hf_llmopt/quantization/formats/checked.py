"""A file format of a user's own: what its functions give is looked at before anybody reads or writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...config import guarded
from ...errors import CallbackFailed
from ...kernels.arguments import Grid
from .scheme import Format, Layout, Scheme


def checked(name: str, made: Any) -> Format:
    """The format, whose mistakes are told by its name and its function.

    Args:
        name: That it was registered under.
        made: What was registered.
    """

    def layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
        found = guarded("format", name, "layout()", made.layout, scheme, outputs, inputs, dtype)
        if not isinstance(found, dict) or not all(map(_is_entry, found.values())):
            raise CallbackFailed(
                f"format {name!r}: layout() returned {found!r}; it is a dict from the name of each tensor to its "
                "shape and dtype: {'codes': ((8, 4), torch.uint8)}, say."
            )
        return found

    def pack(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        found = guarded("format", name, "pack()", made.pack, grid, scheme, dtype)
        outputs, inputs = grid.codes.shape
        wanted = layout(scheme, outputs, inputs, dtype)
        got = {key: _entry(tensor) for key, tensor in found.items()} if isinstance(found, dict) else found
        if got != {key: (tuple(shape), kind) for key, (shape, kind) in wanted.items()}:
            raise CallbackFailed(f"format {name!r}: pack() returned {got!r}, and layout() says {wanted!r}.")
        return found

    def unpack(stored: dict[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
        found = guarded("format", name, "unpack()", made.unpack, stored, scheme, outputs, inputs)
        wanted = [outputs, inputs], [outputs, scheme.groups(inputs)]
        got: Any = type(found).__name__
        if isinstance(found, Grid):
            got = list(found.codes.shape), list(found.scales.shape)
        if got != wanted:
            raise CallbackFailed(
                f"format {name!r}: unpack() returned {got}; it is a Grid with codes {wanted[0]} and scales {wanted[1]}."
            )
        return found

    def obstacle(scheme: Scheme, outputs: int, inputs: int) -> str | None:
        found = guarded("format", name, "obstacle()", made.obstacle, scheme, outputs, inputs)
        if not (found is None or isinstance(found, str)):
            raise CallbackFailed(f"format {name!r}: obstacle() returned {found!r}; it is a reason, or None for none.")
        return found

    return Format(layout, pack, unpack, obstacle)


def _entry(tensor: Any) -> Any:
    return (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], torch.dtype)
