"""How some queries of a pass attend, shown to whoever decides which tokens to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kv_cache import upload
from .inputs import Attend, Call, StepInputs

ELEMENTS = 1 << 23  # weights that are made at one time


class Watch(NamedTuple):
    """Queries of a span.

    Attributes:
        span: Its place in the pass.
        queries: Which of its tokens.
        slots: Leading slots of the request whose weights count.
        scores: By layer, float32 `[kv_heads, slots]`, made where they are missing.
    """

    span: int
    queries: range
    slots: int
    scores: dict[int, Tensor]


class Observer:
    """A backend that also computes the attention weights of a few queries, in layers of full attention.

    Args:
        attend: The backend.
        watches: Which queries.
        fold: Called with a watch's scores and weights `[kv_heads, heads per key head, queries, slots]`, a block of
            queries at a time.
    """

    def __init__(self, attend: Attend, watches: Sequence[Watch], fold: Callable[[Tensor, Tensor], None]) -> None:
        self.attend = attend
        self.watches = watches
        self.fold = fold

    def __call__(self, step: StepInputs, call: Call) -> Tensor:
        """What the backend gives."""
        output = self.attend(step, call)
        if step.group(call.layer).kind == "full":
            kv_heads = step.store.layers[call.layer].kv_heads
            for watch in self.watches:
                if call.layer not in watch.scores:
                    watch.scores[call.layer] = call.query.new_zeros(kv_heads, watch.slots, dtype=torch.float32)
                for weights in _weights(step, call, watch):
                    self.fold(watch.scores[call.layer][:, : weights.shape[-1]], weights)
        return output


def _weights(step: StepInputs, call: Call, watch: Watch) -> Iterator[Tensor]:
    """`softmax(softcap(query @ key^T * scaling))` in blocks of queries, of the keys that they see and that count."""
    span, index = step.spans[watch.span], step.store.group_of[call.layer]
    spec = step.store.layers[call.layer]
    start = span.end(index) - span.length
    places = upload(step.store.slots(span.tables[index], 0, start + watch.queries.stop), call.query.device)
    keys = (
        step.store.read(call.layer, lambda slots: slots[places])[0].transpose(0, 1).float()
    )  # [kv_heads, slots, width]
    heads, size = call.query.shape[1], max(1, ELEMENTS // (call.query.shape[1] * keys.shape[1]))
    for low in range(watch.queries.start, watch.queries.stop, size):
        high = min(low + size, watch.queries.stop)
        query = call.query[0, :, span.offset + low : span.offset + high].float().unflatten(0, (spec.kv_heads, -1))
        seen = keys[:, None, : start + high]
        scores = query @ seen.transpose(-1, -2) * call.scaling
        if call.softcap:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        rows, columns = (
            torch.arange(*ends, device=scores.device) for ends in ((start + low, start + high), (seen.shape[2],))
        )
        scores.masked_fill_(columns > rows[:, None], float("-inf"))
        if call.sinks is not None:
            column = call.sinks.float().reshape(spec.kv_heads, heads // spec.kv_heads, 1, 1)
            scores = torch.cat([scores, column.expand(-1, -1, high - low, -1)], dim=-1)
        yield scores.softmax(-1)[..., : min(seen.shape[2], watch.slots)]
