"""A pass as tensors at fixed addresses, which one copy brings to the device: over short spans, or one prompt's part.

Counts are rounded up, so that many passes have the same shapes, and what is added is padding that reads and writes page
0 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import RUN, Span, aligned, cut, listed
from ..kv_cache import PagedStore

LONGEST = 16  # tokens of a short span, which a kernel of its own reads pages for
MOST_TOKENS = 512  # of a pass over short spans
SHORTEST = 256  # tokens that contexts are rounded up to, at least; beyond, to a power of two
LONGEST_PROMPT = 2048  # tokens of a part of a prompt; more keep the device busy by themselves
COARSE = 64  # tokens that those are rounded up to, at least; beyond, to a sixteenth of the next power of two
COARSE_CONTEXT = 4096  # as SHORTEST: with a prompt only the width of a table depends on it


class Key(NamedTuple):
    """What passes have in common that one graph serves; every Python number of a pass follows from it.

    Attributes:
        rows: Spans, rounded up.
        length: Tokens of each.
        context: Tokens of the longest request, rounded up: the width of the block tables, and the parts that attention
            splits keys into.
        kept: Tokens of a span whose logits are computed: the last one, or all.
        best: Of the logits only the place of the largest of each row counts, and the head makes use of it.
        runs: Of a prompt: whether its aligned blocks of RUN tokens lie in neighbouring slots, for every cache group.
    """

    rows: int
    length: int
    context: int
    kept: int
    best: bool = False
    runs: tuple[bool, ...] = ()

    @property
    def is_prompt(self) -> bool:
        """Whether this is a part of a prompt, with padding behind it, instead of short spans."""
        return self.length > LONGEST


@dataclass
class Batch:
    """A pass, as the host knows it.

    Attributes:
        spans: Shortest first.
        ids: Of each token.
        positions: Likewise.
        kept: Places of tokens whose logits somebody wants.
        slots: Per cache group, where each token is written, int64 `[tokens]` on the CPU.
        columns: As in `SpanCache`, on the CPU; `None` where the model does not ask for them.
        best: As in `Key`.
    """

    spans: Sequence[Span]
    ids: Sequence[int]
    positions: Sequence[int]
    kept: Sequence[int]
    slots: Sequence[Tensor]
    columns: Tensor | None
    best: bool = False


class Parts(NamedTuple):
    """What a pass reads, as views of one buffer of int64.

    Attributes:
        ids: `[tokens]`.
        positions: `[tokens]`.
        columns: `[tokens]`.
        kept: `[rows * kept]`.
        slots: Per cache group, `[tokens]`.
        tiles: Per cache group, int32 `[rows, 3]`.
        tables: Per cache group, int32 `[rows, pages]`; with a prompt, a row more for the padding.
        items: Per cache group, int32 `[tokens, 3]`.
    """

    ids: Tensor
    positions: Tensor
    columns: Tensor
    kept: Tensor
    slots: list[Tensor]
    tiles: list[Tensor]
    tables: list[Tensor]
    items: list[Tensor]


class Inputs:
    """The tensors that a graph reads.

    Args:
        key: Their sizes.
        store: The pages.
        device: Where they lie.
    """

    def __init__(self, key: Key, store: PagedStore, device: torch.device) -> None:
        self.key, self._store = key, store
        with torch.inference_mode(False):  # they outlive the call that made them
            self._buffer = torch.zeros(self._carve(None)[1], dtype=torch.long, device=device)
        self.on_device, _ = self._carve(self._buffer)

    def _carve(self, buffer: Tensor | None) -> tuple[Parts, int]:
        """The parts of a buffer (of none, if only its length is asked for), and its length."""
        rows, length, context, kept = self.key[:4]
        tokens, pages, groups = rows * length, -(-context // self._store.page_size), len(self._store.groups)
        used = 0

        def part(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            nonlocal used
            start, count = used, torch.Size(shape).numel()
            words = -(-count * dtype.itemsize // 8)
            used += -(-words // 16) * 16  # aligned as what the allocator returns, which kernels are compiled for
            given = torch.empty(words, dtype=torch.long) if buffer is None else buffer[start : start + words]
            return given.view(dtype)[:count].view(shape)

        single = part(tokens), part(tokens), part(tokens), part(rows * kept)
        slots = [part(tokens) for _ in range(groups)]
        tiles = [part(rows, 3, dtype=torch.int32) for _ in range(groups)]
        tables = [part(rows + self.key.is_prompt, pages, dtype=torch.int32) for _ in range(groups)]
        items = [part(tokens, 3, dtype=torch.int32) for _ in range(groups)]
        return Parts(*single, slots, tiles, tables, items), used

    def fill(self, batch: Batch) -> None:
        """Bring a pass to the device, in one copy.

        Padding rows, and padding behind a prompt, are requests of one token, id 0 at position 0, whose key lies in the
        first slot of page 0.
        """
        pinned = self._buffer.is_cuda
        buffer = torch.zeros(self._buffer.shape, dtype=torch.long, device="cpu", pin_memory=pinned)
        parts, _ = self._carve(buffer)
        rows, tokens, length = len(batch.spans), len(batch.ids), self.key.length
        parts.ids[:tokens] = _host(batch.ids)
        parts.positions[:tokens] = _host(batch.positions)
        parts.kept[: len(batch.kept)] = _host(batch.kept)
        if batch.columns is not None:
            parts.columns[:tokens] = batch.columns
        for index, group in enumerate(self._store.groups):
            parts.slots[index][:tokens] = batch.slots[index]
            parts.tiles[index][:rows] = cut(batch.spans, length, index)
            for row in range(rows, self.key.rows):
                parts.tiles[index][row] = _host((row * length, length, 1))
            table, items = map(torch.from_numpy, listed(batch.spans, group, index))
            width = min(table.shape[1], parts.tables[index].shape[1])  # pages may be held for tokens to come
            parts.tables[index][:rows, :width] = table[:, :width]
            parts.items[index][:tokens] = items
            padding = parts.items[index][tokens:]
            padding[:, 0] = rows if self.key.is_prompt else torch.arange(rows, self.key.rows).repeat_interleave(length)
            padding[:, 2] = 1
        self._buffer.copy_(buffer, non_blocking=True)


def _host(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device="cpu")


def key_of(batch: Batch, page_size: int) -> Key | None:
    """Of a pass that a graph may serve."""
    lengths = {span.length for span in batch.spans}
    length, rows = max(lengths), len(batch.spans)
    if any(span.branches for span in batch.spans):  # its bits lie nowhere that a graph reads
        return None
    context = 1 << (max(span.context for span in batch.spans) - 1).bit_length()
    if length > LONGEST:
        if rows > 1 or length > LONGEST_PROMPT or len(batch.kept) > 1:
            return None
        step = max(COARSE, (1 << (length - 1).bit_length()) // 16)
        runs = tuple(aligned(table, RUN, page_size) for table in batch.spans[0].tables)
        return Key(1, -(-length // step) * step, max(COARSE_CONTEXT, context), 1, batch.best, runs)
    if len(lengths) > 1 or rows * length > MOST_TOKENS:
        return None
    if any(span.context <= length for span in batch.spans):  # a prompt's beginning: nothing that comes again and again
        return None
    rounded = -(-rows // 16) * 16 if rows > 16 else 1 << (rows - 1).bit_length()
    return Key(rounded, length, max(SHORTEST, context), 1 if len(batch.kept) <= rows else length, batch.best)
