"""`StepInputs`: what attention knows about a forward pass.

A pass computes spans of several requests behind one another, `[1, tokens]`; single-token spans (decodes) first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor, nn

from ..kernels.arguments import TILED, Seen
from ..kv_cache import BlockTable, CacheGroup, PagedStore, upload

CPU = torch.device("cpu")


class Span(NamedTuple):
    """Tokens of one request that are computed in this pass.

    Attributes:
        tables: The request's block tables, one per cache group.
        offset: First token's place in the pass.
        length: Tokens.
        context: Tokens of the request that the last one sees, itself included unless it is masked.
    """

    tables: Sequence[BlockTable]
    offset: int
    length: int
    context: int

    def end(self, group: int) -> int:
        """What the last token sees of the request's slots in a cache group: `context` less what was evicted."""
        return self.context - self.tables[group].evicted


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


class Call(NamedTuple):
    """What a layer's attention is called with in a pass.

    Attributes:
        layer: Its index.
        query: `[1, heads, tokens, key_dim]`.
        key: The spans' own, which are in their pages already, `[1, kv_heads, tokens, key_dim]`.
        value: Likewise, `[1, kv_heads, tokens, value_dim]`.
        scaling: Factor on the dot products.
        softcap: `c` in `c * tanh(score / c)`, or `None`.
        sinks: `[heads]`, or `None`.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether torch has a kernel for it."""
        return not self.softcap and self.sinks is None


class Attend(Protocol):
    """A backend: attention of all spans of a pass in one layer."""

    def __call__(self, step: StepInputs, call: Call) -> Tensor:
        """The output `[1, tokens, heads, value_dim]`."""
        ...


class StepInputs:
    """The spans of one forward pass.

    Args:
        store: Where the pages lie.
        spans: Shortest first, in the order of their tokens.
        slots: Per cache group, the slot of each token of the pass, `[tokens]`.
        attend: The backend.
        note: Called with the name of every attention path that runs.
        tiled: As in `Seen`.
        watched: Whether the backend is to be called for every layer, with its queries.
    """

    def __init__(
        self,
        store: PagedStore,
        spans: Sequence[Span],
        slots: Sequence[Tensor],
        attend: Attend,
        note: Callable[[str], None],
        tiled: int = TILED,
        watched: bool = False,
    ) -> None:
        self.store = store
        self.spans = spans
        self._slots = [{tensor.device: tensor} for tensor in slots]
        self.attend = attend
        self.note = note
        self.tiled = tiled
        self.watched = watched
        self.ahead: Any = None  # what joined layers keep for one another, theirs alone
        self.decodes = self.leading(1)
        self._dense: list[list[DenseRows] | None] = [None] * len(store.groups)
        self._listed: dict[tuple[torch.device, int, range], tuple[Tensor, Tensor, int]] = {}
        self._tiles: dict[tuple[torch.device, int, range, int], Tensor] = {}
        self.classes: dict[Any, str] = {}  # names that a backend gives to what it has measured
        self._runs: dict[tuple[int, range, int], bool] = {}

    def read(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        options: dict[str, Any],
    ) -> Tensor:
        """Store the new keys and values, then attend over the pages; called by the registered attention function.

        Args:
            module: The attention module, for its `layer_idx`.
            query: `[1, heads, tokens, key_dim]`.
            key: `[1, kv_heads, tokens, key_dim]`.
            value: `[1, kv_heads, tokens, value_dim]`.
            scaling: Factor on the dot products.
            options: Further keywords of the attention call.

        Returns:
            `[1, tokens, heads, value_dim]`.
        """
        layer: int = module.layer_idx  # type: ignore[assignment]
        self.store.write(layer, self.slots(layer, key.device), key[0].transpose(0, 1), value[0].transpose(0, 1))
        call = Call(layer, query, key, value, scaling, options.get("softcap"), options.get("s_aux"))
        return self.attend(self, call)

    def slots(self, layer: int, device: torch.device) -> Tensor:
        """The slot of each token of the pass in this layer, on `device`."""
        slots = self._slots[self.store.group_of[layer]]
        if device not in slots:
            slots[device] = next(iter(slots.values())).to(device, non_blocking=True)
        return slots[device]

    def leading(self, length: int) -> int:
        """How many spans have at most `length` tokens; they come first."""
        return next((i for i, span in enumerate(self.spans) if span.length > length), len(self.spans))

    def group(self, layer: int) -> CacheGroup:
        """The layer's cache group."""
        return self.store.groups[self.store.group_of[layer]]

    def dense_rows(self, layer: int) -> list[DenseRows]:
        """Where the decodes' keys are for this layer's group, in the order of the decodes; found once a step."""
        index = self.store.group_of[layer]
        rows = self._dense[index]
        if rows is None:
            rows = self._dense[index] = self._find_rows(index)
        return rows

    def seen(
        self,
        layer: int,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        spans: range | None = None,
        device: torch.device = CPU,
    ) -> Seen:
        """The tokens of neighbouring spans (all by default) as single queries, table and items on a device."""
        index, chosen = self.store.group_of[layer], range(len(self.spans)) if spans is None else spans
        key = (device, index, chosen)
        if key not in self._listed:  # made once a step for the layers of a group
            table, items = listed(self.spans[chosen.start : chosen.stop], self.store.groups[index], index)
            both = upload(torch.from_numpy(numpy.concatenate([table.reshape(-1), items.reshape(-1)])), device)
            parts = both[: table.size].view(table.shape), both[table.size :].view(items.shape)
            self._listed[key] = (*parts, int((items[:, 2] - items[:, 1]).max()))
        table, items, longest = self._listed[key]
        keys, values, spec = self.store.keys[layer], self.store.values[layer], self.store.layers[layer]
        coded = None if spec.form is None else spec.shape
        size = self.store.page_size
        return Seen(keys, values, table, items, size, longest, scaling, softcap, sinks, self.tiled, spec.form, coded)

    def tiles(self, layer: int, device: torch.device, spans: range, size: int) -> Tensor:
        """Neighbouring spans cut into tiles, request by request, in each the tiles first that see most.

        Returns:
            First token, counted from the first span's, number of tokens, at most `size`, and the request's tokens,
            int32 `[tiles, 3]`.
        """
        index = self.store.group_of[layer]
        key = (device, index, spans, size)
        if key not in self._tiles:
            self._tiles[key] = upload(cut(self.spans[spans.start : spans.stop], size, index), device)
        return self._tiles[key]

    def are_runs(self, layer: int, spans: range, size: int) -> bool:
        """Whether every aligned block of `size` tokens of neighbouring spans' requests lies in neighbouring slots."""
        index, page = self.store.group_of[layer], self.store.page_size
        key = (index, spans, size)
        if key not in self._runs:
            tables = (self.spans[row].tables[index] for row in spans)
            if size % page:
                self._runs[key] = page % size == 0
            else:
                self._runs[key] = all(_aligned(table, size // page) for table in tables)
        return self._runs[key]

    def _find_rows(self, index: int) -> list[DenseRows]:
        """Split the decodes into parts whose runs of pages lie at equal distances; gather what has no run."""
        group, size = self.store.groups[index], self.store.page_size
        tables = [span.tables[index] for span in self.spans[: self.decodes]]
        contexts = [span.end(index) for span in self.spans[: self.decodes]]
        firsts = [group.first_visible(context - 1) for context in contexts]
        counts = [context - first for context, first in zip(contexts, firsts, strict=True)]
        starts = [
            table.pages[first // size] * size + first % size if first // size >= table.run else -1
            for table, first in zip(tables, firsts, strict=True)
        ]
        # Masked keys are multiplied by 0, which a NaN survives: a view must not show another request's pages.
        reach = [
            group.pool.next_held(table.pages[-1] + 1) * size - start
            for table, start in zip(tables, starts, strict=True)
        ]
        parts = _split(starts, counts, reach)
        if len(parts) > 1 and self.store.layers[group.layers[0]].device.type != "cpu":
            parts = [(0, len(starts), -1)]  # a launch per part costs more than one gather
        dense = []
        for low, high, stride in parts:
            keys = max(counts[low:high])
            part = DenseRows(high - low, keys, _bias(counts[low:high], keys), starts[low], stride)
            if stride < 0:
                part.index = self._gathered(tables[low:high], firsts[low:high], counts[low:high])
            dense.append(part)
        return dense

    def _gathered(self, tables: Sequence[BlockTable], firsts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Slots of `counts` tokens of each row from the first visible one on, `[rows * keys]` on the CPU."""
        size = self.store.page_size
        pages = _padded([table.pages for table in tables])
        tokens = numpy.asarray(firsts)[:, None] + numpy.arange(max(counts))
        unseen = numpy.arange(max(counts)) >= numpy.asarray(counts)[:, None]
        tokens[unseen] = 0
        slots = numpy.take_along_axis(pages, tokens // size, axis=1).astype(numpy.int64) * size + tokens % size
        slots[unseen] = 0  # padding reads slot 0, under the mask
        return torch.from_numpy(slots.reshape(-1))


class FixedInputs(StepInputs):
    """Spans of one length in a pass that is computed again and again from the same tensors, as a CUDA graph does.

    Args:
        store: Where the pages lie.
        rows: Spans.
        length: Tokens of each.
        context: Most tokens that a request may have.
        slots: Per cache group, the slot of each token, `[tokens]` on the device.
        lists: Per cache group, what `listed` gives, on the device.
        tiles: Per cache group, what `cut` gives, on the device.
        attend: The backend; reads nothing else of the spans.
        note: Called with the name of every attention path that runs.
    """

    def __init__(
        self,
        store: PagedStore,
        rows: int,
        length: int,
        context: int,
        slots: Sequence[Tensor],
        lists: Sequence[tuple[Tensor, Tensor]],
        tiles: Sequence[Tensor],
        attend: Attend,
        note: Callable[[str], None],
    ) -> None:
        spans = [Span((), row * length, length, context) for row in range(rows)]
        super().__init__(store, spans, slots, attend, note)
        every, device = range(rows), tiles[0].device
        for index, (group, found) in enumerate(zip(store.groups, lists, strict=True)):
            longest = context if group.kind == "full" else min(context, group.window)
            self._listed[device, index, every] = (*found, longest)
            self._tiles[device, index, every, length] = tiles[index]


def cut(spans: Sequence[Span], size: int, group: int) -> Tensor:
    """What `StepInputs.tiles` gives for a cache group, on the CPU."""
    found = [
        (span.offset - spans[0].offset + start, min(size, span.length - start), span.end(group))
        for span in sorted(spans, key=lambda span: -span.end(group))  # what starts last is waited for
        for start in reversed(range(0, span.length, size))
    ]
    return torch.tensor(found, dtype=torch.int32, device="cpu")


def listed(spans: Sequence[Span], group: CacheGroup, index: int) -> tuple[Any, Any]:
    """Block tables, int32 `[spans, pages]`, and each token's (row, first visible token, end), int32 `[tokens, 3]`."""
    lengths, ends = [span.length for span in spans], [span.end(index) for span in spans]
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    positions = numpy.concatenate(
        [numpy.arange(start, end, dtype=numpy.int32) for start, end in zip(starts, ends, strict=True)]
    )
    items = numpy.zeros((len(positions), 3), dtype=numpy.int32)
    items[:, 0] = numpy.repeat(numpy.arange(len(spans), dtype=numpy.int32), lengths)
    if group.kind != "full":
        items[:, 1] = [group.first_visible(position) for position in positions.tolist()]
    items[:, 2] = positions + 1
    return _padded([span.tables[index].pages for span in spans]), items


def _aligned(table: BlockTable, pages: int) -> bool:
    """Whether each aligned block of so many pages of a request is a run; the last may be shorter."""
    if table.run == 0:
        return True
    ids = numpy.frombuffer(table.pages, dtype=numpy.int32)
    place = numpy.arange(len(ids)) % pages
    return bool((ids - place == ids[numpy.arange(len(ids)) - place]).all())


def _padded(tables: Sequence[Any]) -> Any:
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
