"""Backends: how the spans of a pass read their pages with torch alone.

Decodes are one batched call over strided views of their runs of pages (a gather only where rows are no runs); longer
spans go request by request: causal attention on their own keys if nothing is cached, else tile by tile of queries, so
that no mask is larger than `TILE` rows.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import InvalidOption
from ..kernels import cpu, reference
from .inputs import Attend, Span, StepInputs

TILE = 256  # queries that share one mask
SHORT = 16  # tokens of a span up to which the C kernel reads pages directly


def reference_paged(
    step: StepInputs,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The plain-torch definition, query by query."""
    step.note("reference")
    seen = step.seen(layer, len(step.spans), scaling, softcap, sinks)
    return reference.paged_attention(query[0].transpose(0, 1), seen)[None]


def cpu_paged(
    step: StepInputs,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    short: int = SHORT,
) -> Tensor:
    """The C kernel where pages lie for spans of up to `short` tokens, torch's attention for longer ones."""
    shorts = step.leading(short)
    if not shorts or key.dtype not in cpu.DTYPES or max(query.shape[3], value.shape[3]) > cpu.MAX_DIM:
        return sdpa(step, layer, query, key, value, scaling, softcap, sinks)
    step.note("cpu")
    seen = step.seen(layer, shorts, scaling, softcap, sinks)
    tokens = query[0, :, : len(seen.items)].transpose(0, 1)
    parts = [cpu.attention(tokens, seen)[None]]
    for span in step.spans[shorts:]:
        parts.append(_extend(step, layer, span, query, key, value, scaling, softcap, sinks))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def sdpa(
    step: StepInputs,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """torch's scaled dot product attention, or plain products where a softcap or sinks forbid it."""
    parts = []
    if step.decodes:
        parts.append(_decode(step, layer, query[:, :, : step.decodes], scaling, softcap, sinks))
    for span in step.spans[step.decodes :]:
        parts.append(_extend(step, layer, span, query, key, value, scaling, softcap, sinks))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _decode(
    step: StepInputs, layer: int, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    tokens = query[0].transpose(0, 1)  # [decodes, heads, width]
    parts, start = [], 0
    for rows in step.dense_rows(layer):
        keys, values = rows.read(step.store.keys[layer]), rows.read(step.store.values[layer])
        part = tokens[start : start + rows.rows]
        start += rows.rows
        mask = rows.mask(query)
        how = "view" if rows.index is None else "gather"
        if softcap or sinks is not None:
            step.note(f"decode-matmul-{how}")
            seen = None if mask is None else mask == 0
            output = reference.attention(part[:, :, None], keys, values, seen, scaling, softcap, sinks)
        else:
            step.note(f"decode-sdpa-{how}")
            # [rows, kv_heads, heads per key head, width]: those heads become a key head's queries.
            part = part.reshape(rows.rows, keys.shape[1], -1, part.shape[2])
            output = scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scaling)
        parts.append(output.reshape(rows.rows, tokens.shape[1], -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _extend(
    step: StepInputs,
    layer: int,
    span: Span,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    group = step.group(layer)
    query, key, value = (t[:, :, span.offset : span.offset + span.length] for t in (query, key, value))
    start = span.context - span.length
    plain = softcap is None and sinks is None
    first = group.first_visible(start)
    if start == 0 and plain and group.first_visible(span.context - 1) == 0:
        step.note("prefill-sdpa")
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2)
    step.note("extend-sdpa" if plain else "extend-matmul")
    if start > 0:
        slots = step.store.slots(span.tables[step.store.group_of[layer]], first, span.context).to(key.device)
        key = step.store.keys[layer][slots][None].transpose(1, 2)
        value = step.store.values[layer][slots][None].transpose(1, 2)
    parts = []
    for tile in range(start, span.context, TILE):
        stop = min(tile + TILE, span.context)
        low = group.first_visible(tile)
        queries = torch.arange(tile, stop, device=query.device)
        keys = torch.arange(low, stop, device=query.device)
        mask = reference.visible(queries, keys, group.kind, group.window)
        part, seen = query[:, :, tile - start : stop - start], slice(low - first, stop - first)
        if plain:
            groups = query.shape[1] // key.shape[1]
            k, v = (t[:, :, seen].repeat_interleave(groups, dim=1) for t in (key, value))
            parts.append(scaled_dot_product_attention(part, k, v, attn_mask=mask, scale=scaling))
        else:
            parts.append(reference.attention(part, key[:, :, seen], value[:, :, seen], mask, scaling, softcap, sinks))
    return torch.cat(parts, dim=2).transpose(1, 2)


BACKENDS: dict[str, Attend] = {"cpu": cpu_paged, "sdpa": sdpa, "reference": reference_paged}


def backend(name: str, device: torch.device, batch_invariant: bool = False) -> Attend:
    """The backend for a configured name; `"auto"` takes the C kernels where they can run.

    Args:
        name: As in `AttentionConfig`.
        device: Where the keys lie.
        batch_invariant: Serve spans of any length query by query, in an order that no neighbour changes.

    Raises:
        InvalidOption: The backend cannot run here; the message says why.
    """
    if name == "auto":
        name = "cpu" if device.type == "cpu" and cpu.available() else "sdpa"
    elif name == "cpu" and (device.type != "cpu" or not cpu.available()):
        reason = cpu.why_not() or f"the model's keys lie on {device}"
        raise InvalidOption(f"AttentionConfig(backend='cpu') cannot run: {reason}. Use 'auto' or 'sdpa'.")
    if batch_invariant:
        if name != "cpu":
            raise InvalidOption(
                f"batch_invariant=True needs the C kernels and a model on the CPU, not backend {name!r}."
            )
        return partial(cpu_paged, short=sys.maxsize)
    return BACKENDS[name]
