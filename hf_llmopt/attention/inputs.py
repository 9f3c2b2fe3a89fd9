"""`StepInputs`: what attention knows about a forward pass.

A pass computes spans of several requests behind one another, `[1, tokens]`; single-token spans (decodes) first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..kv_cache import BlockTable, CacheGroup, PagedStore


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


@dataclass
class DenseRows:
    """How the decodes of a step find their keys in a layer's slots, `[rows, keys]` without a Python loop.

    Either one strided view (`stride` is set: row r starts at slot `base + r * stride`) or a gather (`index`).

    Attributes:
        rows: Decodes.
        keys: Keys of the longest row, counted from its first visible token.
        base: First slot of row 0.
        stride: Slots from one row's first key to the next row's.
        index: Slots `[rows * keys]`, where rows are no runs at equal distances.
        bias: 0 where a row sees a key, else -inf, float32 `[rows, 1, 1, keys]`; `None` if every row sees all.
    """

    rows: int
    keys: int
    base: int
    stride: int | None
    index: Tensor | None
    bias: Tensor | None
    _typed: dict[Any, Tensor] = field(default_factory=dict)

    def read(self, slots: Tensor) -> Tensor:
        """`[rows, kv_heads, keys, width]` of a layer's `slots`, a view where the rows are runs."""
        width = slots.shape[1] * slots.shape[2]
        if self.stride is None:
            assert self.index is not None
            index = self._on(slots.device, self.index.dtype, self.index)
            dense = slots.index_select(0, index).view(self.rows, self.keys, *slots.shape[1:])
        else:
            shape = (self.rows, self.keys, *slots.shape[1:])
            strides = (self.stride * width, width, slots.shape[2], 1)
            dense = slots.as_strided(shape, strides, self.base * width)
        return dense.transpose(1, 2)

    def mask(self, query: Tensor) -> Tensor | None:
        """`bias` in the query's dtype and on its device, converted once a step."""
        return None if self.bias is None else self._on(query.device, query.dtype, self.bias)

    def _on(self, device: torch.device, dtype: torch.dtype, tensor: Tensor) -> Tensor:
        key = (device, dtype)
        if key not in self._typed:
            self._typed[key] = tensor.to(device=device, dtype=dtype)
        return self._typed[key]


class Attend(Protocol):
    """A backend: attention of all spans of a pass in one layer."""

    def __call__(
        self,
        step: StepInputs,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Query `[1, heads, tokens, key_dim]`, the spans' own new keys and values, to `[1, tokens, heads, value_dim]`."""
        ...


class StepInputs:
    """The spans of one forward pass.

    Args:
        store: Where the pages lie.
        spans: Decodes first, in the order of their tokens.
        slots: Per cache group, the slot of each token of the pass, `[tokens]`.
        attend: The backend.
        note: Called with the name of every attention path that runs.
    """

    def __init__(
        self,
        store: PagedStore,
        spans: Sequence[Span],
        slots: Sequence[Tensor],
        attend: Attend,
        note: Callable[[str], None],
    ) -> None:
        self.store = store
        self.spans = spans
        self._slots = [{tensor.device: tensor} for tensor in slots]
        self.attend = attend
        self.note = note
        self.decodes = next((i for i, span in enumerate(spans) if span.length > 1), len(spans))
        self._dense: list[DenseRows | None] = [None] * len(store.groups)

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
        slots = self._slots[self.store.group_of[layer]]
        if key.device not in slots:
            slots[key.device] = next(iter(slots.values())).to(key.device)
        self.store.write(layer, slots[key.device], key[0].transpose(0, 1), value[0].transpose(0, 1))
        return self.attend(self, layer, query, key, value, scaling, options.get("softcap"), options.get("s_aux"))

    @cached_property
    def contexts(self) -> list[int]:
        """Context of every decode."""
        return [span.context for span in self.spans[: self.decodes]]

    def group(self, layer: int) -> CacheGroup:
        """The layer's cache group."""
        return self.store.groups[self.store.group_of[layer]]

    def dense_rows(self, layer: int) -> DenseRows:
        """Where the decodes' keys are for this layer's group; found once a step."""
        index = self.store.group_of[layer]
        rows = self._dense[index]
        if rows is None:
            rows = self._dense[index] = self._find_rows(index)
        return rows

    def _find_rows(self, index: int) -> DenseRows:
        group, page_size = self.store.groups[index], self.store.page_size
        tables = [span.tables[index] for span in self.spans[: self.decodes]]
        firsts = [group.first_visible(context - 1) for context in self.contexts]
        keys = max(context - first for context, first in zip(self.contexts, firsts, strict=True))
        bias = None
        if any(context - first != keys for context, first in zip(self.contexts, firsts, strict=True)):
            lengths = torch.tensor([c - f for c, f in zip(self.contexts, firsts, strict=True)])
            unseen = torch.arange(keys) >= lengths[:, None]
            bias = torch.zeros(unseen.shape).masked_fill_(unseen, float("-inf"))[:, None, None, :]
        starts = [
            table.pages[first // page_size] * page_size + first % page_size
            if first // page_size >= table.run
            else -1
            for table, first in zip(tables, firsts, strict=True)
        ]
        stride = starts[1] - starts[0] if len(starts) > 1 else keys
        total = (group.pool.num_pages + 1) * page_size
        if (
            min(starts) >= 0
            and stride >= keys
            and starts[-1] + keys <= total
            and all(b - a == stride for a, b in zip(starts, starts[1:], strict=False))
        ):
            return DenseRows(len(tables), keys, starts[0], stride, None, bias)
        gathered = torch.zeros(len(tables), keys, dtype=torch.int64)  # padding reads slot 0, under the mask
        for row, (table, first, context) in enumerate(zip(tables, firsts, self.contexts, strict=True)):
            gathered[row, : context - first] = self.store.slots(table, first, context)
        return DenseRows(len(tables), keys, 0, None, gathered.flatten(), bias)
