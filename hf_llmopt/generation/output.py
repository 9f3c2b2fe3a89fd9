"""Caches that enter and leave a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..engine import EngineLoop, Request
from ..kv_cache import PagedCache


def import_cache(engine: EngineLoop, requests: Sequence[Request], cache: Cache, mask: Tensor) -> None:
    """Fill the requests' pages with the keys of a caller's cache; call with the engine's lock held.

    A `PagedCache` of the same pages is forked without copying. Of any other, the unmasked columns are copied.

    Args:
        engine: The engine the requests were added to.
        requests: One per row; they have tables and nothing computed.
        cache: The caller's cache.
        mask: Which of its columns count, bool `[rows, length]`.
    """
    if isinstance(cache, PagedCache) and goes_on(engine, cache, mask):
        for request, tables in zip(requests, cache.rows, strict=True):
            request.tables = [table.fork() for table in tables]
            for table, room in zip(request.tables, request.rooms, strict=True):
                table.room = room
    else:
        copy_in(engine, requests, cache, mask)
    for request, row in zip(requests, mask, strict=True):
        request.computed = request.cached_tokens = int(row.sum())


def goes_on(engine: EngineLoop, cache: PagedCache, mask: Tensor) -> bool:
    """Whether a call can take the cache's pages as they are: they are the engine's, and `mask` hides none of them."""
    return cache.store is engine.store and torch.equal(cache.columns, mask)


def copy_in(engine: EngineLoop, requests: Sequence[Request], cache: Cache, mask: Tensor) -> None:
    """Copy the unmasked columns of a cache into the requests' pages; arguments as of `import_cache`."""
    store, length = engine.store, mask.shape[1]
    counts = mask.sum(dim=1).tolist()
    for request, count in zip(requests, counts, strict=True):
        for group, table in zip(store.groups, request.tables, strict=True):
            if count:
                table.skip(group.first_visible(count - 1))
                table.reserve(table.passed * store.page_size, count)
    for layer, spec in enumerate(store.layers):
        if spec.source is not None:
            continue
        keys, values = _dense(cache, layer)
        seen = keys.shape[2]  # sliding layers keep the last columns only
        for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
            table = request.tables[store.group_of[layer]]
            columns = mask[row, length - seen :].nonzero()[:, 0]
            columns = columns[-(count - table.passed * store.page_size) or len(columns) :].to(keys.device)
            slots = store.slots(table, count - len(columns), count).to(keys.device)
            new_keys, new_values = (
                t[row].index_select(1, columns).transpose(0, 1).to(spec.dtype) for t in (keys, values)
            )
            store.write(layer, slots, new_keys, new_values)


def keeps_every_key(cache: Cache) -> bool:
    """Whether the caller's cache keeps keys behind sliding windows, as a `DynamicCache` made without config does."""
    if isinstance(cache, PagedCache):
        return False
    return not cache.layers or any(type(layer) is DynamicLayer for layer in cache.layers)


def _dense(cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    if isinstance(cache, PagedCache):
        return cache.dense(layer)
    stock: Any = cache.layers[layer]
    return stock.keys, stock.values


def export_cache(engine: EngineLoop, requests: Sequence[Request], mask: Tensor, length: int) -> PagedCache:
    """The requests' pages as a cache of `length` padded columns; call with the engine's lock held.

    Args:
        engine: The engine that holds the pages.
        requests: One per row, with every token but the last computed.
        mask: Which prompt columns are tokens, bool `[rows, prompt length]`.
        length: Columns of the cache.
    """
    generated = torch.ones(len(requests), length - mask.shape[1], dtype=torch.bool, device="cpu")
    tables = [[table.fork() for table in request.tables] for request in requests]
    return PagedCache(engine.store, tables, torch.cat([mask, generated], dim=1))


def write_back(cache: Any, result: PagedCache) -> None:
    """Append what a call computed to the caller's own cache, as stock's loop would have left it.

    Args:
        cache: A `DynamicCache`, updated in place, or a `PagedCache`, which takes the result's pages over.
        result: The call's pages.
    """
    if isinstance(cache, PagedCache):
        cache.adopt(result)
        return
    start = cache.get_seq_length()
    for layer, spec in enumerate(result.store.layers):
        if spec.source is None:
            cache.update(*result.dense(layer, start), layer)
