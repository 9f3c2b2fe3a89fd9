"""How single tokens find their keys for torch: in views of runs of pages, else by a gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from ..kv_cache import BlockTable, CacheGroup, PagedStore, upload


@dataclass
class DenseRows:
    """How some decodes of a step find their keys in a layer's slots, `[rows, keys]` without a Python loop.

    Either one strided view (row r starts at slot `base + r * stride`) or a gather (`index`).

    Attributes:
        rows: Decodes.
        keys: Keys of the longest row, counted from its first visible token.
        bias: 0 where a row sees a key, else -inf, float32 `[rows, 1, 1, keys]`; `None` if every row sees all.
        base: First slot of row 0.
        stride: Slots from one row's first key to the next row's.
        index: Slots `[rows * keys]`, where rows are no runs of pages at equal distances.
    """

    rows: int
    keys: int
    bias: Tensor | None
    base: int = 0
    stride: int = 0
    index: Tensor | None = None
    _typed: dict[Any, Tensor] = field(default_factory=dict)

    def read(self, slots: Tensor) -> Tensor:
        """`[rows, keys, ...]` of a layer's `slots`, a view where the rows are runs."""
        if self.index is not None:
            index = self._on(slots.device, self.index.dtype, self.index)
            return slots.index_select(0, index).view(self.rows, self.keys, *slots.shape[1:])
        width = slots.shape[1] * slots.shape[2]
        shape = (self.rows, self.keys, *slots.shape[1:])
        return slots.as_strided(shape, (self.stride * width, width, slots.shape[2], 1), self.base * width)

    def mask(self, query: Tensor) -> Tensor | None:
        """`bias` in the query's dtype and on its device, converted once a step."""
        return None if self.bias is None else self._on(query.device, query.dtype, self.bias)

    def _on(self, device: torch.device, dtype: torch.dtype, tensor: Tensor) -> Tensor:
        key = (device, dtype)
        if key not in self._typed:
            self._typed[key] = upload(tensor.to(dtype), device)
        return self._typed[key]


def dense_rows(
    store: PagedStore, group: CacheGroup, tables: Sequence[BlockTable], contexts: Sequence[int]
) -> list[DenseRows]:
    """Split decodes into parts whose runs of pages lie at equal distances; gather what has no run.

    Args:
        store: Where the pages lie.
        group: The cache group.
        tables: Each request's block table in it.
        contexts: What each decode sees of its request's slots.
    """
    size = store.page_size
    firsts = [group.first_visible(context - 1) for context in contexts]
    counts = [context - first for context, first in zip(contexts, firsts, strict=True)]
    starts = [
        table.pages[first // size] * size + first % size if first // size >= table.run else -1
        for table, first in zip(tables, firsts, strict=True)
    ]
    # Masked keys are multiplied by 0, which a NaN survives: a view must not show another request's pages.
    reach = [
        group.pool.next_held(table.pages[-1] + 1) * size - start for table, start in zip(tables, starts, strict=True)
    ]
    parts = _split(starts, counts, reach)
    if len(parts) > 1 and store.layers[group.layers[0]].device.type != "cpu":
        parts = [(0, len(starts), -1)]  # a launch per part costs more than one gather
    dense = []
    for low, high, stride in parts:
        keys = max(counts[low:high])
        part = DenseRows(high - low, keys, _bias(counts[low:high], keys), starts[low], stride)
        if stride < 0:
            part.index = _gathered(size, tables[low:high], firsts[low:high], counts[low:high])
        dense.append(part)
    return dense


def _gathered(size: int, tables: Sequence[BlockTable], firsts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Slots of `counts` tokens of each row from the first visible one on, `[rows * keys]` on the CPU."""
    pages = padded([table.pages for table in tables])
    tokens = numpy.asarray(firsts)[:, None] + numpy.arange(max(counts))
    unseen = numpy.arange(max(counts)) >= numpy.asarray(counts)[:, None]
    tokens[unseen] = 0
    slots = numpy.take_along_axis(pages, tokens // size, axis=1).astype(numpy.int64) * size + tokens % size
    slots[unseen] = 0  # padding reads slot 0, under the mask
    return torch.from_numpy(slots.reshape(-1))


def padded(tables: Sequence[Any]) -> Any:
    """Page ids, int32 `[rows, longest]`."""
    padded = numpy.zeros((len(tables), max(map(len, tables))), dtype=numpy.int32)
    for row, pages in enumerate(tables):
        padded[row, : len(pages)] = numpy.frombuffer(pages, dtype=numpy.int32)
    return padded


def _split(starts: Sequence[int], counts: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut rows into parts (first row, end, stride) that one strided view can show.

    Args:
        starts: Slot of each row's first key, -1 if its keys are no run.
        counts: Keys of each row.
        reach: Slots from each row's first key that are nobody else's.

    Returns:
        Parts in order; stride -1 marks rows to gather.
    """
    parts: list[tuple[int, int, int]] = []
    low = 0
    while low < len(starts):
        high, stride = low + 1, counts[low]
        if starts[low] < 0:
            stride = -1
            while high < len(starts) and starts[high] < 0:
                high += 1
        while stride >= 0 and high < len(starts) and starts[high] > starts[high - 1]:
            step = starts[high] - starts[high - 1]
            if (high - low > 1 and step != stride) or max(counts[low : high + 1]) > min(reach[low : high + 1]):
                break
            high, stride = high + 1, step
        parts.append((low, high, stride))
        low = high
    return parts


def _bias(counts: Sequence[int], keys: int) -> Tensor | None:
    if min(counts) == keys:
        return None
    unseen = torch.arange(keys, device="cpu") >= torch.tensor(counts, device="cpu")[:, None]
    return torch.zeros(unseen.shape, dtype=torch.float32, device="cpu").masked_fill_(unseen, float("-inf"))[
        :, None, None, :
    ]
