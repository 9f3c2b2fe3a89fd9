"""Up to how many rows our product beats torch's: measured once per weight shape, format and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from ..kernels import cpu

ROWS = (1, 2, 4, 8, 16)
# Enough weights to stream from memory, as a model does, and no more.
BYTES = 1 << 26

TIE = 1.1  # ours may be this much slower: it makes no temporary, joins a residual, and timings are noisy

_measured: dict[tuple[object, ...], int] = {}


def own_rows(weights: Sequence[Tensor]) -> int:
    """The number of rows up to which `cpu.linear` is at least as fast as torch on these equally shaped weights.

    Args:
        weights: `[outputs, inputs]` each; one after the other is multiplied, as in a model.
    """
    first = weights[0]
    key = (first.shape, first.dtype, torch.get_num_threads())
    if key not in _measured:
        if first.dtype not in cpu.DTYPES or not first.is_contiguous():
            return 0
        chosen = list(weights[: max(1, BYTES // (first.numel() * first.element_size()))])
        best = 0
        for rows in ROWS:
            x = torch.ones(rows, first.shape[1], dtype=first.dtype)  # no draw: the user's seed must not notice
            if not _wins(x, chosen):
                break
            best = rows
        _measured[key] = best
    return _measured[key]


@torch.no_grad()
def _wins(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether ours is as fast, taking turns and judging by the best of several rounds."""
    products: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (cpu.linear, torch.nn.functional.linear)
    best = [float("inf")] * 2
    for _ in range(5):
        for index, product in enumerate(products):
            began = perf_counter()
            for weight in weights:
                product(x, weight)
            best[index] = min(best[index], perf_counter() - began)
    return best[0] <= TIE * best[1]
