"""Up to how many rows our product beats torch's: measured once per weight shape, format and number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor, nn

from ..kernels import cpu
from .kinds import PRODUCTS

ROWS = (1, 2, 4, 8, 16)
# Enough weights to stream from memory, as a model does, and no more.
BYTES = 1 << 26

TIE = 1.1  # ours may be this much slower: it makes no temporary, joins a residual, and timings are noisy

_measured: dict[tuple[object, ...], int] = {}


def own_rows(kind: type[nn.Module], weights: Sequence[Tensor]) -> int:
    """The number of rows up to which our product is at least as fast as torch's on these equally shaped weights.

    Args:
        kind: The module that multiplies, a key of `PRODUCTS`.
        weights: Its weights; one after the other is multiplied, as in a model.
    """
    first = weights[0]
    key = (kind, first.shape, first.dtype, torch.get_num_threads())
    if key not in _measured:
        if first.dtype not in cpu.DTYPES or not first.is_contiguous():
            return 0
        chosen = list(weights[: max(1, BYTES // (first.numel() * first.element_size()))])
        best, spent = 0, [0.0, 0.0]
        for rows in ROWS:
            x = torch.ones(
                rows, first.shape[kind is nn.Linear], dtype=first.dtype, device="cpu"
            )  # no draw: the user's seed must not notice
            # One limit serves all counts below it, so what counts is their sum.
            spent = [sum(pair) for pair in zip(spent, _seconds(kind, x, chosen), strict=True)]
            if spent[0] <= TIE * spent[1]:
                best = rows
        _measured[key] = best
    return _measured[key]


@torch.no_grad()
def _seconds(kind: type[nn.Module], x: Tensor, weights: Sequence[Tensor]) -> list[float]:
    """What ours and torch's take, in turns, the best of several rounds."""
    best = [float("inf")] * 2
    for _ in range(5):
        for index, product in enumerate(PRODUCTS[kind]):
            began = perf_counter()
            for weight in weights:
                product(x, weight, None)
            best[index] = min(best[index], perf_counter() - began)
    return best
