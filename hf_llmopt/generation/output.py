"""Caches that enter and leave a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..engine import EngineLoop, Request, copy_in
from ..kv_cache import PagedCache, states_of


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
        copy_in(engine.store, requests, cache, mask)
    for request, row in zip(requests, mask, strict=True):
        request.computed = request.cached_tokens = int(row.sum())


def goes_on(engine: EngineLoop, cache: PagedCache, mask: Tensor) -> bool:
    """Whether a call can take the cache's pages as they are: they are the engine's, and `mask` hides none of them."""
    return cache.store is engine.store and torch.equal(cache.columns, mask)


def keeps_every_key(cache: Cache) -> bool:
    """Whether the caller's cache keeps keys behind sliding windows, as a `DynamicCache` made without config does."""
    if isinstance(cache, PagedCache):
        return False
    return not cache.layers or any(type(layer) is DynamicLayer for layer in cache.layers)


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
        if spec.stores:
            cache.update(*result.dense(layer, start), layer)


def with_states(result: PagedCache, requests: Sequence[Request], config: Any) -> DynamicCache:
    """What stock's loop would have left of a model with recurrent states: the pages' keys beside the states."""
    cache = DynamicCache(config=config)
    states_of(requests).copy_to(cache)
    write_back(cache, result)
    return cache
