"""Memory that was freed and that the C library keeps: it goes back to the system while many weights are changed.

glibc keeps freed blocks of up to 32 MiB for itself, and what lies between those that live on is never given back: of a
model of 1.2 billion weights that was a quarter of a gigabyte, half as much as its quantized weights.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

EVERY = 1 << 25  # weights


class Freed:
    """Counts the weights that were worked on, and gives freed memory back once in a while."""

    def __init__(self) -> None:
        self._weights = 0

    def after(self, weights: int) -> None:
        """So many more weights are done."""
        self._weights += weights
        if self._weights >= EVERY:
            self._weights = 0
            give_back()


def give_back() -> None:
    """Give memory that is free back to the system; does nothing where the C library has no such function."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
