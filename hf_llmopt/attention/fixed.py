"""`FixedInputs`: what attention knows about a pass whose inputs lie in tensors at fixed addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kv_cache import PagedStore
from .inputs import RUN, Attend, Span, StepInputs


class FixedInputs(StepInputs):
    """Spans of one length in a pass that is computed again and again from the same tensors, as a CUDA graph does.

    A single span may have padding behind it, which is another request's.

    Args:
        store: Where the pages lie.
        rows: Spans.
        length: Tokens of each.
        context: Most tokens that a request may have.
        slots: Per cache group, the slot of each token, `[tokens]` on the device.
        lists: Per cache group, what `listed` gives, on the device.
        tiles: Per cache group, what `cut` gives for tiles of `length`, on the device.
        runs: Per cache group, whether aligned blocks of RUN tokens lie in neighbouring slots.
        attend: The backend; reads nothing else of the spans.
        note: Called with the name of every attention path that runs.
    """

    def __init__(
        self,
        store: PagedStore,
        rows: int,
        length: int,
        context: int,
        slots: Sequence[Tensor],
        lists: Sequence[tuple[Tensor, Tensor]],
        tiles: Sequence[Tensor],
        runs: Sequence[bool],
        attend: Attend,
        note: Callable[[str], None],
    ) -> None:
        spans = [Span((), row * length, length, context) for row in range(rows)]
        super().__init__(store, spans, slots, attend, note)
        every, device = range(rows), tiles[0].device
        for index, (group, found) in enumerate(zip(store.groups, lists, strict=True)):
            longest = context if group.kind == "full" else min(context, group.window)
            self._listed[device, index, every] = (*found, None, longest)
            self._tiles[device, index, every, length] = tiles[index]
        self._length, self._aligned = length, runs

    def tiles(self, layer: int, device: torch.device, spans: range, size: int) -> Tensor:
        """As in `StepInputs`; smaller tiles of a single span are found on the device, those of its padding behind."""
        index = self.store.group_of[layer]
        key = (device, index, spans, size)
        if key not in self._tiles:
            _, own, end = self._tiles[device, index, spans, self._length][0].unbind()
            number = torch.arange(-(-self._length // size), -1, -1, dtype=torch.int32, device=device)
            first = -(-own // size)  # of the padding's tiles
            pads = number >= first
            start = torch.where(pads, own + (number - first) * size, number * size)
            count = torch.where(pads, self._length - start, own - start).clamp(max=size)
            found = torch.stack([start, count, torch.where(pads, 1, end)], dim=1).int()
            # One is too many where tiles end where the span does: it is the first one again.
            self._tiles[key] = torch.where((count > 0)[:, None], found, found[-1])
        return self._tiles[key]

    def are_runs(self, layer: int, spans: range, size: int) -> bool:
        """As in `StepInputs`."""
        return RUN % size == 0 and self._aligned[self.store.group_of[layer]]
