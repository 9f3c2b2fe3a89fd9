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
            if _seconds(cpu.linear, x, chosen) > _seconds(torch.nn.functional.linear, x, chosen):
                break
            best = rows
        _measured[key] = best
    return _measured[key]


@torch.no_grad()
def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> float:
    times = []
    for _ in range(4):
        began = perf_counter()
        for weight in weights:
            product(x, weight)
        times.append(perf_counter() - began)
    return min(times)
