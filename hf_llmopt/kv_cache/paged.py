"""`PagedCache`: rows of pages as a `transformers.Cache`.

Inside the engine a forward pass gets a `SpanCache`, which leaves writing and reading of pages to the attention
function.
What `generate` returns is a `PagedCache`: the same pages, seen as a batch of rows, that any transformers code may use
as `past_key_values`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import InvalidRequest, UnsupportedModel
from .pool import BlockTable
from .store import PagedStore


class SpanCache(Cache):
    """What a forward pass over spans gets as `past_key_values`: it stores nothing.

    The attention function writes the pages, because only what arrives there is what attention reads: latent attention
    (DeepSeek) hands compressed states to the cache and expands what comes back.

    Attributes:
        columns: Padded column of each token of the pass, minus its place in the pass, `[tokens]`; set by the runner.
        reads_columns: Whether the model asked for them (Llama 4 scales queries by column where it has no rotary
            embedding).
    """

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.layers = []
        self.columns: Tensor | int = 0
        self.reads_columns = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what came."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """0 in general; for a layer, what turns a token's place in the pass into its column."""
        if layer_idx is None:
            return 0
        self.reads_columns = True
        return self.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0: no mask is made."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The pass's own tokens: no mask is made."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Unbounded."""
        return -1

    def __len__(self) -> int:
        return self.num_layers


class PagedCache(Cache):
    """Rows of pages, used as an ordinary `past_key_values`.

    Outside the engine, `update` returns gathered dense keys and values with stock's padding: correct in any
    transformers code, and slower than the engine, which reads the pages where they lie. `copy.deepcopy` forks the rows
    without copying a page until one of them writes to it. Pages return to the pool when the object is collected.

    Args:
        store: The tensors the pages lie in.
        rows: Block tables of each row, one per cache group; the cache takes them over.
        columns: Which columns of the padded batch are tokens, bool `[rows, length]` on the CPU; others are padding.

    Example:
        >>> from hf_llmopt import demo
        >>> model, tokenizer = demo.load()
        >>> inputs = tokenizer("import os", return_tensors="pt")
        >>> out = model.generate(**inputs, llmopt=True, max_new_tokens=4, return_dict_in_generate=True)
        >>> type(out.past_key_values).__name__, out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
        ('PagedCache', True)
    """

    is_compileable = False

    def __init__(self, store: PagedStore, rows: Sequence[Sequence[BlockTable]], columns: Tensor) -> None:
        self.store = store
        self.rows = [list(tables) for tables in rows]
        self.columns = columns
        # Slots of the tokens that the first layer of a forward pass reserved, for the layers that follow.
        self._pending: dict[int, list[Tensor]] = {}
        self._finalizer = weakref.finalize(self, store.dropped.append, self.rows)

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """No layer objects: the pages are the storage."""
        return []

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def is_sliding(self) -> list[bool]:
        """`False` for every layer: dense keys are returned at full, padded length."""
        return [False] * len(self.store.layers)

    is_linear = is_dummy = is_sliding
    is_croppable = True

    def __len__(self) -> int:
        return len(self.store.layers)

    def __repr__(self) -> str:
        return f"PagedCache(rows={len(self.rows)}, length={self.columns.shape[1]}, pages={self.num_pages})"

    @property
    def num_pages(self) -> int:
        """Pages the rows hold, all groups together; shared ones count once per row."""
        return sum(table.held for tables in self.rows for table in tables)

    @property
    def evicted(self) -> int:
        """Tokens that were evicted from some layers, all rows together."""
        return sum(max((table.evicted for table in tables), default=0) for tables in self.rows)

    def num_tokens(self, row: int) -> int:
        """Tokens of a row, padding not counted."""
        return int(self.columns[row].sum())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Padded length, as stock's caches report it."""
        return self.columns.shape[1] - self._ahead(layer_idx)

    def _ahead(self, layer_idx: int) -> int:
        """Columns that earlier layers of a running forward pass have added and this one has not."""
        if not self._pending or layer_idx not in self._pending:
            return 0
        return self._pending[layer_idx][0].shape[0] if self._pending[layer_idx] else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that the next `update` returns."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Unbounded."""
        return -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[rows, kv_heads, tokens, width]`; return all keys and values, dense and padded."""
        if not self.store.dense:
            raise UnsupportedModel(
                "This model hands compressed states to its cache, and pages hold the expanded keys: only generate("
                "llmopt=...) can go on from this PagedCache."
            )
        spec = self.store.layers[layer_idx]
        if key_states.dtype != spec.dtype:
            raise InvalidRequest(f"This cache holds {spec.dtype}, the forward pass brings {key_states.dtype}.")
        if key_states.shape[0] != len(self.rows):
            raise InvalidRequest(f"This cache has {len(self.rows)} rows, the forward pass {key_states.shape[0]}.")
        self._check_whole()
        if layer_idx not in self._pending:
            self._append(key_states.shape[2])
        for row, slots in enumerate(self._pending.pop(layer_idx)):
            slots = slots.to(key_states.device)
            new = (states[row].detach().transpose(0, 1) for states in (key_states, value_states))
            self.store.write(layer_idx, slots, *new)
        return self.dense(layer_idx)

    def _append(self, count: int) -> None:
        """Add `count` token columns to every row and remember, for each layer, where they go."""
        starts = [self.num_tokens(row) for row in range(len(self.rows))]
        needs = [
            sum(tables[group].missing(start, start + count) for tables, start in zip(self.rows, starts, strict=True))
            for group in range(len(self.store.groups))
        ]
        self.store.provide(needs)
        self._pending = {layer: [] for group in self.store.groups for layer in group.layers}
        for tables, start in zip(self.rows, starts, strict=True):
            for group, table in enumerate(tables):
                if copies := table.reserve(start, start + count):
                    self.store.copy_pages(group, copies)
                slots = self.store.slots(table, start, start + count)
                for layer in self.store.groups[group].layers:
                    self._pending[layer].append(slots)
        self.columns = torch.cat(
            [self.columns, torch.ones(len(self.rows), count, dtype=torch.bool, device="cpu")], dim=1
        )

    def dense(self, layer_idx: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer from column `start` on, `[rows, kv_heads, columns, width]`, padding zero."""
        self._check_whole()
        group = self.store.group_of[layer_idx]
        parts = []
        for row, tables in enumerate(self.rows):
            index = self.store.slots(tables[group], 0, self.num_tokens(row)).to(self.store.layers[layer_idx].home)
            parts.append(self.store.read(layer_idx, partial(torch.index_select, dim=0, index=index)))
        outputs = []
        for found in zip(*parts, strict=True):
            dense = found[0].new_zeros(len(found), self.columns.shape[1], *found[0].shape[1:])
            for row, part in enumerate(found):
                dense[row, self.columns[row].to(part.device)] = part
            outputs.append(dense[:, start:].transpose(1, 2))
        return outputs[0], outputs[1]

    def _check_whole(self) -> None:
        if self.evicted:
            raise InvalidRequest(
                f"This cache has lost {self.evicted} tokens to eviction, and a forward pass outside the engine would "
                "take the others for all: only generate with the same llmopt= goes on from it."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns, as stock's caches do; 0 drops none.

        Raises:
            InvalidRequest: It was asked for columns to keep, or a sliding window has passed or eviction taken what
                would be seen again.
        """
        if tokens_to_remove > 0:
            raise InvalidRequest(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}.")
        columns = self.columns[:, : max(0, self.columns.shape[1] + tokens_to_remove)]
        for row, tables in enumerate(self.rows):
            length = int(columns[row].sum())
            for group, table in zip(self.store.groups, tables, strict=True):
                if 0 < length < table.settled:
                    raise InvalidRequest(
                        f"Row {row} cannot go back to {length} tokens: some of its first {table.settled} were evicted. "
                        "Compute the text again."
                    )
                if group.first_visible(length) < table.passed * self.store.page_size:
                    raise InvalidRequest(
                        f"Row {row} cannot go back to {length} tokens: its window of {group.window} tokens has passed "
                        "what they would see there, and those pages were given back. Compute the text again."
                    )
        self.columns = columns
        for row, tables in enumerate(self.rows):
            for table in tables:
                table.crop(self.num_tokens(row))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; a row may appear more than once."""
        chosen = [int(index) for index in indices]
        forks = [[table.fork() for table in self.rows[index]] for index in chosen]
        self._release()
        self.rows[:] = forks
        self.columns = self.columns[chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        self.batch_select_indices(torch.arange(len(self.rows), device="cpu").repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Forget every token."""
        self._release()
        self.columns = self.columns[:, :0]

    def _release(self) -> None:
        for tables in self.rows:
            for table in tables:
                table.clear()

    def fork(self) -> PagedCache:
        """The same rows in a second cache; pages are copied when one of the two writes to them."""
        return PagedCache(self.store, [[table.fork() for table in tables] for tables in self.rows], self.columns)

    def adopt(self, other: PagedCache) -> None:
        """Become what `other` is: its rows are forked, the own ones given back."""
        fork = other.fork()
        self._finalizer.detach()
        self._release()
        self.store, self.rows, self.columns = fork.store, fork.rows, fork.columns
        fork._finalizer.detach()
        self._finalizer = weakref.finalize(self, self.store.dropped.append, self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        memo[id(self)] = copy = self.fork()
        return copy

    def __reduce__(self) -> NoReturn:
        raise TypeError("A PagedCache lives in its engine's pages and cannot be pickled; save tokens instead.")
