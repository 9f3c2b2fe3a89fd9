"""From scores to tokens, with stock's own noise.

`torch.multinomial(p, 1)` draws `q ~ Exp(1)` of p's shape and returns `argmax(p / q)` (the exponential race: the minimum
of independent exponentials with rates p falls on index i with probability p_i). Drawing the noise ourselves gives the
same tokens and leaves the generator in the same state, and later lets a row use its noise before its neighbours do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidLogits
from ..kernels import cpu, reference


def greedy(scores: Tensor) -> Tensor:
    """The best token of each row of `[rows, vocabulary]`, in any float format.

    Raises:
        InvalidLogits: A row contains NaN.

    Example:
        >>> import torch
        >>> greedy(torch.tensor([[0.0, 2.0, 1.0]])).tolist()
        [1]
    """
    return _checked(pick(scores))


def draw(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The noise of one step, `Exp(1)` in the shape of `like`, as `torch.multinomial` draws it."""
    return torch.empty_like(like, memory_format=torch.contiguous_format).exponential_(1, generator=generator)


def sample(scores: Tensor, noise: Tensor) -> Tensor:
    """One token per row of `[rows, vocabulary]`, distributed as `softmax(scores)`.

    Raises:
        InvalidLogits: A row contains NaN, or only minus infinity.

    Example:
        >>> import torch
        >>> scores = torch.randn(2, 5)
        >>> _ = torch.manual_seed(0)
        >>> ours = sample(scores, draw(scores))
        >>> _ = torch.manual_seed(0)
        >>> ours.tolist() == torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()
        True
    """
    return _checked(pick(scores, noise))


def pick(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """What `greedy`, or with noise `sample`, returns, without waiting for the device; -1 for a row with NaN."""
    if noise is not None:
        scores = torch.softmax(scores, dim=-1).div_(noise)
    if scores.device.type == "cpu" and cpu.available() and scores.dtype in cpu.DTYPES and scores.stride(-1) == 1:
        return cpu.argmax(scores)
    return reference.argmax(scores)


def invalid(rows: Sequence[int]) -> InvalidLogits:
    """The error of rows for which `pick` found NaN."""
    return InvalidLogits(
        f"The scores of row(s) {list(rows)} contain NaN. The model's weights or inputs are broken, or its number "
        "format overflows (try bfloat16 or float32), or a logits processor divided by zero."
    )


def _checked(tokens: Tensor) -> Tensor:
    if rows := [row for row, token in enumerate(tokens.tolist()) if token < 0]:
        raise invalid(rows)
    return tokens
