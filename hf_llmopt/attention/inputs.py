"""`StepInputs`: what attention knows about a forward pass.

A pass computes spans of several requests behind one another, `[1, tokens]`; single-token spans (decodes) first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor, nn

from ..kernels.arguments import TILED, Seen
from ..kv_cache import BlockTable, CacheGroup, PagedStore, upload
from .rows import DenseRows, dense_rows, padded
from .tree import Nodes, nodes_of

CPU = torch.device("cpu")
RUN = 128  # tokens of the largest block that a kernel wants in neighbouring slots


class Span(NamedTuple):
    """Tokens of one request that are computed in this pass.

    Attributes:
        tables: The request's block tables, one per cache group.
        offset: First token's place in the pass.
        length: Tokens.
        context: Tokens of the request that the last one sees, itself included unless it is masked.
        parents: Of the span's last tokens, which are guesses that form a tree, which of them each one follows; -1 for
            the token before them. `None`: each token follows the one before it. See `tree.py`.
    """

    tables: Sequence[BlockTable]
    offset: int
    length: int
    context: int
    parents: Sequence[int] | None = None

    @property
    def branches(self) -> bool:
        """Whether any token does not follow the one before it."""
        return self.parents is not None and any(parent != node - 1 for node, parent in enumerate(self.parents))

    def nodes(self, group: CacheGroup, index: int) -> Nodes:
        """What the guesses of a span that branches see in a cache group."""
        assert self.parents is not None
        return nodes_of(self.parents, self.end(index) - len(self.parents), group)

    def end(self, group: int) -> int:
        """What the last token sees of the request's slots in a cache group: `context` less what was evicted."""
        return self.context - self.tables[group].evicted


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
        self._listed: dict[tuple[torch.device, int, range], tuple[Tensor, Tensor, Tensor | None, int]] = {}
        self._tiles: dict[tuple[torch.device, int, range, int], Tensor] = {}
        self._bounds: dict[tuple[torch.device, range], Tensor] = {}
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
            query: `[1, heads, tokens, key_dim]`; also `[tokens, heads, 1, key_dim]`, a row for each request.
            key: `[1, kv_heads, tokens, key_dim]`, or likewise.
            value: `[1, kv_heads, tokens, value_dim]`, or likewise.
            scaling: Factor on the dot products.
            options: Further keywords of the attention call.

        Returns:
            `[1, tokens, heads, value_dim]`, or `[tokens, 1, heads, value_dim]`.
        """
        if query.shape[0] != 1:
            query, key, value = (states.transpose(0, 2) for states in (query, key, value))
            return self.read(module, query, key, value, scaling, options).transpose(0, 1)
        layer: int = module.layer_idx  # type: ignore[assignment]
        if self.store.layers[layer].source is None:
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
            spans = self.spans[: self.decodes]
            tables, ends = [span.tables[index] for span in spans], [span.end(index) for span in spans]
            rows = self._dense[index] = dense_rows(self.store, self.group(layer), tables, ends)
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
            found = self.spans[chosen.start : chosen.stop]
            table, items = listed(found, self.store.groups[index], index)
            bits = branches(found, self.store.groups[index], index)
            parts = [part.reshape(-1) for part in (table, items, bits) if part is not None]
            sent = upload(torch.from_numpy(numpy.concatenate(parts)), device).split([len(part) for part in parts])
            longest = int((items[:, 2] - items[:, 1]).max())
            tree = None if bits is None else sent[2]
            self._listed[key] = (sent[0].view(table.shape), sent[1].view(items.shape), tree, longest)
        table, items, tree, longest = self._listed[key]
        keys, values, spec = self.store.keys[layer], self.store.values[layer], self.store.layers[layer]
        coded = None if spec.form is None else spec.shape
        size = self.store.page_size
        how = scaling, softcap, sinks, self.tiled, spec.form, coded, tree
        return Seen(keys, values, table, items, size, longest, *how)

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

    def bounds(self, spans: range, device: torch.device) -> Tensor:
        """Where neighbouring spans begin, counted from the first one, and the end: int32 `[spans + 1]`."""
        if (device, spans) not in self._bounds:
            lengths = [span.length for span in self.spans[spans.start : spans.stop]]
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")
            self._bounds[device, spans] = upload(bounds, device)
        return self._bounds[device, spans]

    def are_runs(self, layer: int, spans: range, size: int) -> bool:
        """Whether every aligned block of `size` tokens of neighbouring spans' requests lies in neighbouring slots."""
        index = self.store.group_of[layer]
        key = (index, spans, size)
        if key not in self._runs:
            tables = (self.spans[row].tables[index] for row in spans)
            self._runs[key] = all(aligned(table, size, self.store.page_size) for table in tables)
        return self._runs[key]


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
        for stop, span in zip(itertools.accumulate(lengths), spans, strict=True):
            if span.branches:
                nodes = span.nodes(group, index)
                items[stop - len(nodes.firsts) : stop, 1] = nodes.firsts
    items[:, 2] = positions + 1
    return padded([span.tables[index].pages for span in spans]), items


def branches(spans: Sequence[Span], group: CacheGroup, index: int) -> Any:
    """Each token's bits, int32 `[tokens]` as in `Seen.tree`; `None` if no span branches."""
    if not any(span.branches for span in spans):
        return None
    bits = [numpy.full(span.length, -1, dtype=numpy.int32) for span in spans]
    for own, span in zip(bits, spans, strict=True):
        if span.branches:
            nodes = span.nodes(group, index)
            own[-len(nodes.bits) :] = nodes.bits
    return numpy.concatenate(bits)


def aligned(table: BlockTable, size: int, page: int) -> bool:
    """Whether each aligned block of `size` tokens of a request lies in neighbouring slots; the last may be shorter.

    Args:
        table: The request's.
        size: Tokens.
        page: Tokens of a page.
    """
    if size % page:
        return page % size == 0
    if table.run == 0:
        return True
    ids, pages = numpy.frombuffer(table.pages, dtype=numpy.int32), size // page
    place = numpy.arange(len(ids)) % pages
    return bool((ids - place == ids[numpy.arange(len(ids)) - place]).all())
