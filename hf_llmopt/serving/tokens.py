"""How single tokens are shown."""

from __future__ import annotations

from typing import Any

from .text import UNFINISHED

LEAST = -9999.0  # stands for the logarithm of 0, which JSON has no word for


def token_text(tokenizer: Any, token: int) -> str:
    """The text of a token alone."""
    text: str = tokenizer.decode([token])
    return text


def token_bytes(text: str) -> list[int] | None:
    """UTF-8 of a token's text; `None` for a part of a character, whose bytes the text does not tell."""
    return None if UNFINISHED in text else list(text.encode())


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST)
