"""Up to how many rows our product beats torch's: measured once per weight shape, format and number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.race import best_seconds
from .kinds import PRODUCTS, Product

ROWS = (1, 2, 4, 8, 16, 32, 64)
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
            ways = [partial(_multiply, product, x, chosen) for product in PRODUCTS[kind]]
            spent = [sum(pair) for pair in zip(spent, best_seconds(ways, 5 if rows <= 16 else 2), strict=True)]
            if spent[0] <= TIE * spent[1]:
                best = rows
        _measured[key] = best
    return _measured[key]


def _multiply(product: Product, x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        product(x, weight, None)
