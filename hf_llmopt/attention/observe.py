"""Some queries of a pass and how they attend, shown to whoever decides which tokens to keep."""

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
        scores: By layer, what is folded, made where it is missing.
    """

    span: int
    queries: range
    slots: int
    scores: dict[int, Tensor]


class Observer:
    """A backend that also looks at a few queries, in layers of full attention.

    Args:
        attend: The backend.
        watches: Which queries.
        fold: Called with what a watch has folded and with a block of queries: if `weighs`, with float32
            `[kv_heads, slots]` and weights `[kv_heads, heads per key head, queries, slots]`, else with float32
            `[heads, key_dim + 1, key_dim + 1]` and scaled queries `[heads, queries, key_dim]`.
        weighs: Whether attention weights are computed.
    """

    def __init__(
        self, attend: Attend, watches: Sequence[Watch], fold: Callable[[Tensor, Tensor], None], weighs: bool = True
    ) -> None:
        self.attend = attend
        self.watches = watches
        self.fold = fold
        self.weighs = weighs

    def __call__(self, step: StepInputs, call: Call) -> Tensor:
        """What the backend gives."""
        output = self.attend(step, call)
        if step.group(call.layer).kind == "full":
            for watch in self.watches:
                if self.weighs:
                    self._weigh(step, call, watch)
                else:
                    self._fold_queries(step, call, watch)
        return output

    def _weigh(self, step: StepInputs, call: Call, watch: Watch) -> None:
        if call.layer not in watch.scores:
            kv_heads = step.store.layers[call.layer].kv_heads
            watch.scores[call.layer] = call.query.new_zeros(kv_heads, watch.slots, dtype=torch.float32)
        for weights in _weights(step, call, watch):
            self.fold(watch.scores[call.layer][:, : weights.shape[-1]], weights)

    def _fold_queries(self, step: StepInputs, call: Call, watch: Watch) -> None:
        _, heads, _, width = call.query.shape
        if call.layer not in watch.scores:
            watch.scores[call.layer] = call.query.new_zeros(heads, width + 1, width + 1, dtype=torch.float32)
        first = step.spans[watch.span].offset
        queries = call.query[0, :, first + watch.queries.start : first + watch.queries.stop]
        self.fold(watch.scores[call.layer], queries.float() * call.scaling)


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
