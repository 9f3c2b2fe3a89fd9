"""Backends: how the spans of a pass read their pages.

The C kernels read pages where they lie. With torch alone, single tokens are one batched call over strided views of
their runs of pages (a gather only where rows are no runs). Longer spans go request by request: causal attention on
their own keys, joined with that over tiles of the keys before them, which are views of the pages too. Where windows,
softcaps or sinks forbid that, it is tile by tile of queries, so that no mask is larger than `TILE` rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kernels import cpu, reference
from ..kv_cache import BlockTable, upload
from .inputs import Call, Span, StepInputs
from .tree import visible

SHORT_VECTORS = ("portable", "avx2")  # levels at which torch computes long spans several times as fast as our tiles
TILE = 256  # queries that share one mask
COPIED = 1024  # keys that are copied at a time where pages are no run
_flags = threading.Lock()


def reference_paged(step: StepInputs, call: Call) -> Tensor:
    """The plain-torch definition, query by query."""
    step.note("reference")
    seen = step.seen(call.layer, call.scaling, call.softcap, call.sinks)
    return reference.paged_attention(call.query[0].transpose(0, 1), seen)[None]


def cpu_paged(step: StepInputs, call: Call) -> Tensor:
    """The C kernels, which read pages where they lie; torch's for long spans where vectors are short."""
    if call.key.dtype not in cpu.DTYPES or max(call.query.shape[3], call.value.shape[3]) > cpu.MAX_DIM:
        return sdpa(step, call)
    every = len(step.spans)
    ours = every if cpu.used() not in SHORT_VECTORS else step.leading(step.tiled - 1)
    if ours == 0:
        return sdpa(step, call)
    if step.spans[0].length < step.tiled:
        step.note("cpu")
    if step.spans[ours - 1].length >= step.tiled:
        step.note("flash")
    seen = step.seen(call.layer, call.scaling, call.softcap, call.sinks, None if ours == every else range(ours))
    found = cpu.attention(call.query[0, :, : len(seen.items)].transpose(0, 1), seen)[None]
    return found if ours == every else torch.cat([found, sdpa(step, call, range(ours, every))], dim=1)


def sdpa(step: StepInputs, call: Call, spans: range | None = None) -> Tensor:
    """torch's scaled dot product attention, or plain products where a softcap or sinks forbid it.

    Args:
        step: The pass.
        call: The layer's attention.
        spans: Neighbouring ones, all by default; where the first is among them, all single tokens are.
    """
    spans = range(len(step.spans)) if spans is None else spans
    parts = []
    start = spans.start
    if start < step.decodes:
        parts.append(_decode(step, call))
        start = step.decodes
    for span in step.spans[start : spans.stop]:
        parts.append(_extend(step, call, span))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _decode(step: StepInputs, call: Call) -> Tensor:
    query = call.query[:, :, : step.decodes]
    tokens = query[0].transpose(0, 1)  # [decodes, heads, width]
    parts, start = [], 0
    for rows in step.dense_rows(call.layer):
        keys, values = (found.transpose(1, 2) for found in step.store.read(call.layer, rows.read))
        part = tokens[start : start + rows.rows]
        start += rows.rows
        mask = rows.mask(query)
        how = "view" if rows.index is None else "gather"
        if not call.is_plain:
            step.note(f"decode-matmul-{how}")
            seen = None if mask is None else mask == 0
            output = reference.attention(part[:, :, None], keys, values, seen, call.scaling, call.softcap, call.sinks)
        else:
            step.note(f"decode-sdpa-{how}")
            # [rows, kv_heads, heads per key head, width]: those heads become a key head's queries.
            part = part.reshape(rows.rows, keys.shape[1], -1, part.shape[2])
            output = _attend(part, keys, values, attn_mask=mask, scale=call.scaling)
        parts.append(output.reshape(rows.rows, tokens.shape[1], -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's attention, but for cuDNN's: it builds a plan for every new shape, and here each step brings one.

    Measured on an H200: 60 ms for a plan, and more than 1 s for some, where the kernel takes 0.1 ms.
    """
    if query.device.type != "cuda":
        return scaled_dot_product_attention(query, key, value, **options)
    with _flags:  # they are torch's, of the whole process
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            return scaled_dot_product_attention(query, key, value, **options)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)


def _extend(step: StepInputs, call: Call, span: Span) -> Tensor:
    layer, *tensors, scaling, softcap, sinks = call
    group, index = step.group(layer), step.store.group_of[layer]
    end = span.end(index)
    query, key, value = (t[:, :, span.offset : span.offset + span.length] for t in tensors)
    start = end - span.length
    plain = call.is_plain
    rounded = step.store.layers[layer].form is not None  # pages do not hold quite what the span brings
    first = group.first_visible(start)
    whole = group.first_visible(end - 1) == 0  # every query sees all tokens before it
    if start == 0 and plain and whole and not rounded and not span.branches:
        step.note("prefill-sdpa")
        output = _attend(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2)
    table = span.tables[index]
    if plain and whole and not rounded and query.device.type == "cpu" and query.shape[3] == value.shape[3]:
        step.note("extend-tiles")
        tiles = (_tile(step, layer, table, *tile) for tile in _tiles(table, step.store.page_size, start))
        own = _mask(step, layer, span, range(start, end), range(start, end)) if span.branches else None
        return _cascade(query, key, value, tiles, scaling, own).transpose(1, 2)
    step.note("extend-sdpa" if plain else "extend-matmul")
    if start > 0 or rounded:
        key, value = _tile(step, layer, table, first, end)
    parts = []
    for tile in range(start, end, TILE):
        stop = min(tile + TILE, end)
        low = group.first_visible(min(tile, end - len(span.parents or ())))
        mask = _mask(step, layer, span, range(tile, stop), range(low, stop))
        part, seen = query[:, :, tile - start : stop - start], slice(low - first, stop - first)
        if plain:
            groups = query.shape[1] // key.shape[1]
            k, v = (t[:, :, seen].repeat_interleave(groups, dim=1) for t in (key, value))
            parts.append(_attend(part, k, v, attn_mask=mask, scale=scaling))
        else:
            parts.append(reference.attention(part, key[:, :, seen], value[:, :, seen], mask, scaling, softcap, sinks))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _mask(step: StepInputs, layer: int, span: Span, queries: range, keys: range) -> Tensor:
    """Which of a request's slots are seen by some of a span's, bool `[queries, keys]`."""
    group, index, device = step.group(layer), step.store.group_of[layer], step.store.layers[layer].device
    if span.branches:
        base = span.end(index) - len(span.parents or ())
        return visible(queries, keys, group, base, span.nodes(group, index), device)
    rows, columns = (torch.arange(slots.start, slots.stop, device=device) for slots in (queries, keys))
    return reference.visible(rows, columns, group.kind, group.window)


def _tiles(table: BlockTable, page_size: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut tokens [0, end) where the pages are no run; what is no run of its own is cut into tiles of COPIED tokens."""
    run = min(table.run * page_size, end)
    for start in range(0, run, COPIED):
        yield start, min(start + COPIED, run)
    if run < end:
        yield run, end


def _tile(step: StepInputs, layer: int, table: BlockTable, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a request's slots [start, stop), `[1, kv_heads, slots, width]`: a view of a run of pages."""
    size = step.store.page_size
    where: Any = None
    if start >= table.run * size:
        first = table.pages[start // size] * size + start % size
        where = slice(first, first + stop - start)
    else:
        where = upload(step.store.slots(table, start, stop), step.store.layers[layer].device)
    keys, values = step.store.read(layer, lambda slots: slots[where][None])
    return keys.transpose(1, 2), values.transpose(1, 2)


def _cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Iterable[tuple[Tensor, Tensor]],
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """A span's attention over its own keys, joined with that over tiles of earlier keys, which it sees whole.

    Parts of a softmax are joined by the logarithms of their sums (Dao et al. 2022). Query heads that
    share a key head are its queries one after the other, so that no key is repeated and no mask is made.

    Args:
        query: `[1, heads, tokens, width]`.
        key: The span's, `[1, kv_heads, tokens, width]`.
        value: Likewise.
        tiles: Keys and values of earlier tokens.
        scaling: Factor on the dot products.
        mask: Which of its own keys each token sees, bool `[tokens, tokens]`; `None` for all before it.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    total, weight = attend(query, key, value, 0.0, mask is None, attn_mask=mask, scale=scaling)
    total, folded = total.float(), query.reshape(1, key.shape[1], -1, query.shape[3])
    for keys, values in tiles:
        part, own = attend(folded, keys, values, 0.0, False, scale=scaling)
        part, own = part.reshape(query.shape).float(), own.reshape(weight.shape)
        both = torch.logaddexp(weight, own)
        total = total * (weight - both).exp()[..., None] + part * (own - both).exp()[..., None]
        weight = both
    return total.to(query.dtype)
