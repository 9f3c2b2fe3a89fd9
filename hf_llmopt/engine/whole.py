"""Prompts that the model's own pass has computed whole: what it left becomes pages, states and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ..config import LLMOptConfig
from ..kv_cache import PagedCache, PagedStore, States
from .request import Request


def take_in(
    store: PagedStore, requests: Sequence[Request], cache: Cache, mask: Tensor, logits: Tensor, states: bool
) -> None:
    """Let requests go on from a pass over their padded prompts.

    Args:
        store: Where the requests' pages lie.
        requests: One per row; they have tables and nothing computed.
        cache: What the pass filled.
        mask: Which of its columns count, bool `[rows, length]` on the CPU.
        logits: Behind each row's last column, `[rows, vocabulary]`.
        states: The cache holds recurrent states besides.
    """
    copy_in(store, requests, cache, mask)
    kept = States(cache, len(requests)) if states else None
    for row, request in enumerate(requests):
        request.computed = len(request.tokens)
        request.logits = logits[row]
        request.state = None if kept is None else (kept, row)


def copy_in(store: PagedStore, requests: Sequence[Request], cache: Cache, mask: Tensor) -> None:
    """Copy the unmasked columns of a cache into the requests' pages; arguments as of `take_in`."""
    length, counts = mask.shape[1], mask.sum(dim=1).tolist()
    for request, count in zip(requests, counts, strict=True):
        for table in request.tables:
            table.reserve(0, count)
    for layer, spec in enumerate(store.layers):
        if not spec.stores:
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


def _dense(cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    if isinstance(cache, PagedCache):
        return cache.dense(layer)
    stock: Any = cache.layers[layer]
    return stock.keys, stock.values


def unlike_states(config: LLMOptConfig, dense: bool, sharded: bool) -> str | None:
    """What models with recurrent states do without, if it was asked for or is needed; else `None`."""
    if not dense:
        return "hands compressed keys to its cache, which cannot be copied into pages"
    if config.kv_cache.eviction is not None:
        return f"eviction={config.kv_cache.eviction!r} takes tokens away, which a state has read: leave it out"
    if config.batch_invariant:
        return "batch_invariant=True asks for products of ours, which are not proved for them"
    if config.graphs is True:
        return "graphs=True asks for passes at fixed addresses, and where states lie depends on who runs"
    return "they are not shared between ranks" if sharded else None
