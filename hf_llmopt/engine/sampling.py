"""From scores to tokens, with stock's own noise.

`torch.multinomial(p, 1)` draws `q ~ Exp(1)` of p's shape and returns `argmax(p / q)` (the exponential race: the minimum
of independent exponentials with rates p falls on index i with probability p_i). Drawing the noise ourselves gives the
same tokens and leaves the generator in the same state, and later lets a row use its noise before its neighbours do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..attention.gpu import why_not
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


class Tape:
    """The noise that stock draws for the rows of a call, step after step, for rows that look ahead.

    Args:
        rows: Of the call.
        generator: Draws it; `None` for the default one of the scores' device.
    """

    def __init__(self, rows: int, generator: torch.Generator | None = None) -> None:
        self._rows = rows
        self._generator = generator
        self._steps: deque[tuple[Tensor, Tensor]] = deque()  # the generator's state before each, [rows, vocabulary]
        self._first = 0  # step of the first of them

    def read(self, row: int, step: int, like: Tensor) -> Tensor:
        """What a row uses in a step, `[1, vocabulary]`; `like` has that shape."""
        if self._generator is None:
            index = like.device.index
            self._generator = torch.cuda.default_generators[index] if like.is_cuda else torch.default_generator
        while self._first + len(self._steps) <= step:
            state = self._generator.get_state()
            self._steps.append((state, draw(like.new_empty(self._rows, like.shape[1]), self._generator)))
        return self._steps[step - self._first][1][row : row + 1]

    def passed(self, step: int) -> None:
        """No row will use the noise of an earlier step again."""
        while self._steps and self._first < step:
            self._steps.popleft()
            self._first += 1

    def rewind(self, step: int) -> None:
        """Leave the generator as if this step and those behind it had not been drawn."""
        self.passed(step)
        if self._steps and self._generator is not None:
            self._generator.set_state(self._steps[0][0])
            self._steps.clear()


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
    if scores.is_cuda and _has_triton(scores.device):
        from ..kernels.triton import argmax as kernel  # Triton may be missing where nothing is launched

        if kernel.serves(scores):
            return kernel.argmax(scores)
    return reference.argmax(scores)


@cache
def _has_triton(device: torch.device) -> bool:
    return why_not(device) is None


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
