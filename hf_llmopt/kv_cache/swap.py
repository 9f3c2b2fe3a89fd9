"""Keys and values of a request in host memory, while others use its pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .store import PagedStore


class Swapped:
    """A copy of a request's pages, in all layers.

    Args:
        store: Where the pages lie.
        pages: Page ids per cache group, in token order; 0 where a window has passed.

    Attributes:
        passed: Leading pages per cache group that windows have passed.
    """

    def __init__(self, store: PagedStore, pages: Sequence[Sequence[int]]) -> None:
        self.passed = [sum(page == 0 for page in group) for group in pages]
        store.settle()
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer, group in enumerate(store.group_of):
            held = [page for page in pages[group] if page]
            keys, values = (_pages(store, slots[layer])[held] for slots in (store.keys, store.values))
            self._layers.append((_to_host(keys), _to_host(values)))
        for device in {layer.device for layer in store.layers if layer.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()  # once for all layers

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(tensor.nbytes for pair in self._layers for tensor in pair)

    def restore(self, store: PagedStore, pages: Sequence[Sequence[int]]) -> None:
        """Write everything back.

        Args:
            store: The store it was copied from.
            pages: The request's pages now, per cache group; fewer than were saved, where it was cut meanwhile.
        """
        store.settle()
        for layer, (group, saved) in enumerate(zip(store.group_of, self._layers, strict=True)):
            for slots, tensor in zip((store.keys, store.values), saved, strict=True):
                first = self.passed[group]
                held = list(pages[group][first : first + len(tensor)])
                _pages(store, slots[layer])[held] = tensor[: len(held)].to(slots[layer].device, non_blocking=True)


def _pages(store: PagedStore, slots: Tensor) -> Tensor:
    """A layer's slots as `[pages, page_size, kv_heads, width]`."""
    return slots.view(-1, store.page_size, *slots.shape[1:])


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
