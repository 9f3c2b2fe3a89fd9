"""Slots that are kept move together, so that pages come free."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...kernels.arguments import PageFormat
from ..pool import BlockTable
from ..store import PagedStore


def compact(
    store: PagedStore, group: int, table: BlockTable, tokens: int, kept: Mapping[int, Tensor], settled: int
) -> None:
    """Keep some of a request's slots, each key head its own, in new pages; give the old ones back.

    Rotary positions are part of the keys and stay what they are.

    Args:
        store: Where the pages lie.
        group: Index of the cache group.
        table: The request's table in that group.
        tokens: Tokens of the request so far.
        kept: By layer of the group, slots in their order, int64 `[kv_heads, kept]`, the same number in each.
        settled: From which token on none was evicted.

    Raises:
        OutOfPages: `table.lacks` pages; the table is empty.
    """
    count = next(iter(kept.values())).shape[1]
    old = store.slots(table, 0, tokens - table.evicted)
    # Old pages may be handed out again at once: a layer's rows are read before the first of them is written.
    table.repack(tokens, count, settled)
    new = store.slots(table, 0, count)
    for layer in store.groups[group].layers:
        spec = store.layers[layer]
        index = kept[layer].T
        source, target = (places.to(index.device) for places in (old, new))
        for slots in (store.keys[layer], store.values[layer]):
            _move(slots, source, index, target, spec.kv_heads, spec.form)


def _move(slots: Tensor, source: Tensor, index: Tensor, target: Tensor, kv_heads: int, form: PageFormat | None) -> None:
    """Slots `source[index[:, head]]` of each head to `target`; index `[kept, kv_heads]`."""
    rows = slots[source]
    if form is None:
        slots[target] = rows.gather(0, index[..., None].expand(-1, -1, rows.shape[2]))
        return
    start = 0
    codes = rows.shape[2] - 2 * form.parts * kv_heads
    for width in (codes, rows.shape[2] - codes):  # of all heads' codes, and of their scales
        part = rows[:, 0, start : start + width].unflatten(1, (kv_heads, -1))
        moved = part.gather(0, index[..., None].expand(-1, -1, part.shape[2]))
        slots[target, 0, start : start + width] = moved.flatten(1)
        start += width
