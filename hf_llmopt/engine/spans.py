"""What a pass is told of its spans, pairs (request, tokens to compute), shortest first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import Watch
from ..kv_cache import PagedStore, upload
from .request import Request

Spans = Sequence[tuple[Request, int]]


def ids_of(spans: Spans) -> list[int]:
    """Token ids of the pass; -1 for those that the host does not know yet."""
    return [token for r, length in spans for token in r.tokens[r.computed : r.computed + length]]


def put_unknown(spans: Spans, ids: Tensor) -> None:
    """Write ids that the host does not know yet into those of the pass, `[tokens]`, on the device."""
    unknown: dict[int, tuple[Tensor, list[int], list[int]]] = {}  # by their source: where to, and from where
    end = 0
    for request, length in spans:
        end += length
        if request.pending is not None and length == request.remaining:
            source, index = request.pending
            _, places, indices = unknown.setdefault(id(source), (source, [], []))
            places.append(end - 1)
            indices.append(index)
    for source, places, indices in unknown.values():
        known = source[long(indices, source.device)].to(ids.device, non_blocking=True)
        # -1 stands for scores that contain NaN: the row fails once the host knows, and the others must not
        ids[long(places, ids.device)] = known.clamp_min(0)


def slots_of(store: PagedStore, spans: Spans) -> list[Tensor]:
    """Per cache group, where each token of the pass is written, `[tokens]`."""
    per_group = []
    for group in range(len(store.groups)):
        slots: list[int] = []
        for request, length in spans:
            slots += request.tables[group].slots(range(request.computed, request.computed + length))
        per_group.append(torch.tensor(slots, device="cpu"))
    return per_group


def columns_of(spans: Spans) -> Tensor:
    """Padded column of each token, minus its place in the pass, `[tokens]`."""
    columns = [r.left_padding + i for r, length in spans for i in range(r.computed, r.computed + length)]
    return torch.tensor(columns, device="cpu") - torch.arange(len(columns), device="cpu")


def watches_of(spans: Spans) -> list[Watch]:
    """The queries of a pass that somebody looks at; they count as seen from now on."""
    watches = []
    for index, (request, length) in enumerate(spans):
        selection, start = request.selection, request.computed
        if selection is None:
            continue
        first = max(selection.looks.start, selection.scores.seen, start)
        queries = range(first - start, min(selection.looks.stop, start + length) - start)
        if queries:
            watches.append(Watch(index, queries, selection.held, selection.scores.layers))
            selection.scores.seen = start + queries.stop
    return watches


def long(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor on a device."""
    return upload(torch.tensor(values, dtype=torch.long, device="cpu"), device)
