"""The tensors behind the pages.

Every layer keeps its keys and values in two tensors of slots, `[pages * page_size, kv_heads, width]`, or as bytes if
pages are quantized (`PageFormat`). Token i of a request lies in slot
`pages[i // page_size] * page_size + i % page_size`.
Layers with the same lifetime form a group and share page ids, so there is one block table per request and group,
whatever the number of layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import KVCacheConfig
from ..errors import OutOfPages, UnsupportedModel
from ..kernels import reference
from ..kernels.arguments import PAGE_FORMATS, PageFormat, Shape
from ..kernels.pages import pack_rows
from .pool import BlockTable, PagePool
from .transfer import free_bytes, pinned_zeros, upload


@dataclass(frozen=True)
class LayerSpec:
    """What one layer stores for a token.

    Attributes:
        kind: `"full"`, `"sliding"` (the last `window` tokens are visible), `"chunked"` (those of the same chunk), or
            `"none"` for a layer without attention.
        window: Tokens of the window or chunk, 0 for full attention.
        kv_heads: Key and value heads.
        key_dim: Width of a key.
        value_dim: Width of a value.
        dtype: Number format.
        device: Where the layer lives.
        form: How pages hold it, if they are quantized.
        offloaded: Pages lie in host memory.
        source: The layer whose keys and values it reads, which stores none of its own; else `None`.
    """

    kind: str
    window: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    form: PageFormat | None = None
    offloaded: bool = False
    source: int | None = None

    @property
    def stores(self) -> bool:
        """Whether it has keys and values of its own."""
        return self.kind != "none" and self.source is None

    @property
    def home(self) -> torch.device:
        """Where pages lie."""
        return torch.device("cpu") if self.offloaded else self.device

    @property
    def shape(self) -> Shape:
        """Heads and widths."""
        return Shape(self.kv_heads, self.key_dim, self.value_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        if self.form is not None:
            return sum(self.form.row_bytes(self.kv_heads, width) for width in (self.key_dim, self.value_dim))
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def slots(self, width: int, count: int) -> Tensor:
        """Zeroed slots for keys or values of this width, `[count, kv_heads, width]` or as `PageFormat` says.

        Zeros, because slots that no token was written to are read under a mask, and 0 * NaN would be NaN.
        """
        form = self.form
        row = (self.kv_heads, width) if form is None else (1, form.row_bytes(self.kv_heads, width))
        dtype = self.dtype if form is None else torch.uint8
        with torch.inference_mode(False):  # pages outlive the call that made them
            if self.offloaded and self.device.type == "cuda":
                return pinned_zeros((count, *row), dtype, self.device)
            return torch.zeros(count, *row, dtype=dtype, device=self.home)


@dataclass
class CacheGroup:
    """Layers whose keys and values live equally long."""

    kind: str
    window: int
    layers: list[int]
    pool: PagePool

    def first_visible(self, position: int) -> int:
        """Index of the first token that the query at index `position` may see."""
        if self.kind == "sliding":
            return max(0, position + 1 - self.window)
        if self.kind == "chunked":
            return position - position % self.window
        return 0

    def pages_for(self, num_tokens: int, page_size: int, span: int) -> int:
        """Most pages a request of `num_tokens` tokens holds at one time, if a step computes up to `span` of them."""
        pages = -(-num_tokens // page_size)
        if self.kind == "full":
            return pages
        return min(pages, -(-(self.window + span) // page_size) + 1)


class PagedStore:
    """Keys and values of every layer in pages, grown on demand within a budget.

    Args:
        layers: What each layer stores, by layer index.
        config: Page size and budget.
        dense: Whether pages hold what the model hands to a cache (not so for latent attention, which expands it).
        reads_columns: Whether the model asks its cache for the padded column of a token.
    """

    def __init__(
        self, layers: Sequence[LayerSpec], config: KVCacheConfig, dense: bool = True, reads_columns: bool = False
    ) -> None:
        form = PAGE_FORMATS.get(config.dtype)
        self.layers = [replace(layer, form=form, offloaded=config.offload and layer.kind == "full") for layer in layers]
        self.dense = dense
        self.reads_columns = reads_columns
        self.config = config
        self.page_size = config.page_size
        self.groups: list[CacheGroup] = []
        self.group_of: list[int] = []
        for index, layer in enumerate(self.layers):
            if not layer.stores:
                self.group_of.append(-1 if layer.source is None else self.group_of[layer.source])
                continue
            key = (layer.kind, layer.window)
            known = [(group.kind, group.window) for group in self.groups]
            if key not in known:
                self.groups.append(CacheGroup(*key, [], PagePool(0)))
                known.append(key)
            self.group_of.append(known.index(key))
            self.groups[self.group_of[-1]].layers.append(index)
        # Rows of collected `PagedCache` objects. Collection may strike inside a pool's method, so it only queues them.
        self.dropped: deque[list[list[BlockTable]]] = deque()
        if form is not None and form.bits == 4:
            for index, layer in enumerate(self.layers):
                if odd := [width for width in layer.shape[1:] if width % 2]:
                    raise UnsupportedModel(
                        f"KVCacheConfig(dtype='int4') puts two numbers into a byte, and keys or values of layer "
                        f"{index} are {odd[0]} wide. Use 'int8' or 'fp8'."
                    )
        self.settle: Callable[[], None] = lambda: None  # waits until nobody copies pages to or from host memory
        self.moves = 0  # how often pages got other memory
        self.clear()

    def clear(self) -> None:
        """Give the memory of all pages back; nobody may hold one."""
        self.settle()
        for group in self.groups:
            group.pool.clear()
        self.keys = [layer.slots(layer.key_dim, self.page_size) for layer in self.layers]
        self.values = [layer.slots(layer.value_dim, self.page_size) for layer in self.layers]
        self._share()

    def _share(self) -> None:
        """Layers that store nothing read another's slots."""
        self.moves += 1
        for index, layer in enumerate(self.layers):
            if layer.source is not None:
                self.keys[index], self.values[index] = self.keys[layer.source], self.values[layer.source]

    def page_bytes(self, group: int) -> int:
        """Bytes of one page in all layers of a group."""
        return self.page_size * sum(self.layers[index].token_bytes for index in self.groups[group].layers)

    @property
    def pages_used(self) -> int:
        """Pages held by anybody, all groups together."""
        self.reclaim()
        return sum(group.pool.used for group in self.groups)

    def reclaim(self) -> None:
        """Take back the pages of caches that were garbage collected."""
        while self.dropped:
            for tables in self.dropped.popleft():
                for table in tables:
                    table.clear()

    def limits(self) -> list[int]:
        """Most pages each group's pool may have under the budget."""
        limits = []
        for index, group in enumerate(self.groups):
            if self.config.max_tokens is not None:
                limits.append(max(group.pool.num_pages, -(-self.config.max_tokens // self.page_size)))
                continue
            share = self.page_bytes(index) / sum(self.page_bytes(other) for other in range(len(self.groups)))
            free = min(map(free_bytes, {self.layers[layer].home for layer in group.layers}))
            extra = int(free * self.config.memory_fraction * share) // self.page_bytes(index)
            limits.append(group.pool.num_pages + extra)
        return limits

    def provide(self, pages: Sequence[int]) -> None:
        """Grow the pools, as far as the budget allows, until `pages[group]` pages are blank in each group.

        Beyond the budget, pages that the prompt cache keeps make way.
        """
        self.reclaim()
        missing = [count - group.pool.blank for count, group in zip(pages, self.groups, strict=True)]
        if all(count <= 0 for count in missing):
            return
        for index, (count, limit) in enumerate(zip(missing, self.limits(), strict=True)):
            pool = self.groups[index].pool
            if count > 0 and limit > pool.num_pages:
                # At least half as much again, so that a growing number of requests copies its pages seldom.
                self._grow(index, min(limit, pool.num_pages + max(count, pool.num_pages // 2)))

    def _grow(self, group: int, num_pages: int) -> None:
        self.settle()
        try:
            for index in self.groups[group].layers:
                layer = self.layers[index]
                for tensors, width in ((self.keys, layer.key_dim), (self.values, layer.value_dim)):
                    old = tensors[index]
                    tensors[index] = layer.slots(width, (num_pages + 1) * self.page_size)
                    tensors[index][: old.shape[0]] = old
        except (RuntimeError, MemoryError, OSError) as error:
            if "alloc" not in str(error) and "memory" not in str(error):
                raise
            raise OutOfPages(f"There is no memory for {num_pages} pages of the KV cache: {error}") from error
        self._share()
        self.groups[group].pool.grow(num_pages)

    def tables(self, rooms: Sequence[int]) -> list[BlockTable]:
        """Empty block tables of a new request, one per group."""
        return [BlockTable(group.pool, self.page_size, room) for group, room in zip(self.groups, rooms, strict=True)]

    def copy_pages(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) in all layers of a group."""
        self.settle()
        held = [slots for index in self.groups[group].layers for slots in (self.keys[index], self.values[index])]
        # Once for each device: a list as an index is copied there, and waited for, each time.
        both = {device: torch.tensor(pairs).T.to(device) for device in {slots.device for slots in held}}
        for slots in held:
            source, target = both[slots.device]
            pages = slots.view(-1, self.page_size, *slots.shape[1:])
            pages[target] = pages[source]

    def move(self, group: int, moves: Sequence[tuple[int, int]]) -> None:
        """Copy single slots (from, to) in all layers of a group: all are read before the first is written.

        Example:
            >>> from hf_llmopt import KVCacheConfig
            >>> spec = LayerSpec("full", 0, 1, 1, 1, torch.float32, torch.device("cpu"))
            >>> store = PagedStore([spec], KVCacheConfig(page_size=4))
            >>> store.write(0, torch.arange(4), torch.arange(4.0).view(4, 1, 1), torch.ones(4, 1, 1))
            >>> store.move(0, [(2, 1), (3, 2)])
            >>> store.keys[0].flatten().tolist()
            [0.0, 2.0, 3.0, 3.0]
        """
        self.settle()
        places: dict[torch.device, Tensor] = {}
        for slots in self._tensors(group):
            if slots.device not in places:
                places[slots.device] = upload(
                    torch.tensor(moves, dtype=torch.long, device="cpu").view(-1, 2).T, slots.device
                )
            source, target = places[slots.device]
            slots.index_copy_(0, target, slots.index_select(0, source))

    def wipe(self, group: int, pages: Sequence[int]) -> None:
        """Zero pages that a request leaves unfinished: they may hold NaN, which masks do not stop."""
        self.settle()
        for index in self.groups[group].layers:
            for slots in (self.keys[index], self.values[index]):
                slots.view(-1, self.page_size, *slots.shape[1:])[list(pages)] = 0

    def read_pages(self, group: int, pages: Sequence[int], tokens: int) -> Tensor:
        """The first `tokens` slots of pages in all layers of a group, as bytes: uint8 `[pages, bytes]` on the CPU."""
        self.settle()
        parts = []
        for slots in self._tensors(group):
            paged = slots.view(-1, self.page_size, *slots.shape[1:])[list(pages), :tokens]
            parts.append(paged.flatten(1).view(torch.uint8).cpu())
        return torch.cat(parts, dim=1)

    def write_pages(self, group: int, pages: Sequence[int], tokens: int, rows: Tensor) -> None:
        """Fill the first `tokens` slots of each page with what `read_pages` returned."""
        self.settle()
        start = 0
        for slots in self._tensors(group):
            shape = (len(pages), tokens, *slots.shape[1:])
            stop = start + tokens * slots.shape[1] * slots.shape[2] * slots.dtype.itemsize
            part = rows[:, start:stop].contiguous().view(slots.dtype).view(shape)
            slots.view(-1, self.page_size, *slots.shape[1:])[list(pages), :tokens] = part.to(slots.device)
            start = stop

    def _tensors(self, group: int) -> list[Tensor]:
        """Keys and values of each layer of a group."""
        return [slots[index] for index in self.groups[group].layers for slots in (self.keys, self.values)]

    def slots(self, table: BlockTable, start: int, stop: int) -> Tensor:
        """Slots of tokens [start, stop), evicted ones not counted, int64 on the CPU. Passed tokens lie in page 0."""
        tokens = torch.arange(start, stop, device="cpu")
        pages = torch.tensor(table.pages, dtype=torch.int64, device="cpu")
        return pages[tokens // self.page_size] * self.page_size + tokens % self.page_size

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys `[tokens, kv_heads, key_dim]` and values `[tokens, kv_heads, value_dim]` in their slots."""
        form = self.layers[layer].form
        if form is not None:
            keys, values = pack_rows(keys, form, form.rotates), pack_rows(values, form)
        self.settle()
        for own, new in ((self.keys[layer], keys), (self.values[layer], values)):
            own.index_copy_(0, slots.to(own.device), new.to(own.device))
        self.written(layer)

    def written(self, layer: int) -> None:
        """Called when the new keys and values of a layer are in their slots."""

    def read(self, layer: int, take: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of some slots, as the model made them but for rounding.

        Args:
            layer: Its index.
            take: Chooses slots, `[slots, ...]` to `[..., *]`: a view where pages are not quantized.

        Returns:
            `[..., kv_heads, key_dim]` and `[..., kv_heads, value_dim]`.
        """
        self.settle()
        spec = self.layers[layer]
        keys, values = (take(own[layer]).to(spec.device) for own in (self.keys, self.values))
        if spec.form is None:
            return keys, values
        return (
            reference.unpack_rows(keys, spec.form, spec.kv_heads, spec.key_dim, spec.dtype, spec.form.rotates),
            reference.unpack_rows(values, spec.form, spec.kv_heads, spec.value_dim, spec.dtype),
        )
