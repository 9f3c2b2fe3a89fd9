"""A streamer that writes text as it becomes final."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer


class Writer(TextStreamer):
    """Hands every finished piece of text to a function.

    Args:
        tokenizer: Decodes the tokens.
        write: Called with each piece.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `put` and `end` with what is final."""
        self.text += text
        if text:
            self.write(text)
