"""Text out of tokens as they come: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6  # tokens of the prompt that are decoded along: what follows them may begin with a blank, or not
MOST_PARTS = 8  # tokens after which what is still no character will never be one
UNFINISHED = "\ufffd"


class TextStream:
    """Turns tokens into text.

    Args:
        tokenizer: The model's.
        prompt: Ids before the first new token.
        stops: Texts behind which nothing is shown.
        skip_special_tokens: Leave out the end of the text, and its like.
        include_stop: Show the stop string itself.

    Attributes:
        length: Characters so far, those included that wait for a stop string to be ruled out.
        stops: As given.
        stopped: Whether a stop string came.

    Example:
        >>> from hf_llmopt import demo
        >>> from hf_llmopt.serving.text import TextStream
        >>> _, tokenizer = demo.load()
        >>> stream = TextStream(tokenizer, [], stops=["sys"])
        >>> pieces = [stream.add(token) for token in tokenizer("import os, sys, re")["input_ids"]]
        >>> "".join(pieces), stream.stopped
        ('import os, ', True)
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.length = 0
        self.stopped = False
        self._tokenizer = tokenizer
        self.stops = stops
        self._skip = skip_special_tokens
        self._include = include_stop
        self._ids = list(prompt[-CONTEXT:])  # those before `_read` are shown, and decoded along
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        self._held = ""  # may be the beginning of a stop string

    def add(self, *tokens: int) -> str:
        """The text that is certain now; empty while a character or a stop string may be incomplete.

        It is the same whether tokens come one by one or together, also where their bytes are no text.
        """
        if self.stopped:
            return ""
        if len(tokens) > 1:
            ids = [*self._ids, *tokens]
            text = self._decode(ids)
            if UNFINISHED not in text[len(self._known) :]:  # whole characters, whose last one has some tokens
                start = len(ids) - 1
                while start > self._read and self._decode(ids[:start]).endswith(UNFINISHED):
                    start -= 1
                self._ids = ids
                return self._take(text, start)
        return "".join([self._one(token) for token in tokens])

    def end(self) -> str:
        """What was held back; no token follows."""
        if self.stopped:
            return ""
        piece = self._take(self._decode(self._ids), self._read) if len(self._ids) > self._read else ""
        return piece + self._held

    def _one(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) - self._read < MOST_PARTS:
            return ""
        return "" if self.stopped else self._take(text, self._read)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text

    def _take(self, text: str, start: int) -> str:
        """Show all tokens, whose text this is; those from `start` on are the context of what follows."""
        piece = text[len(self._known) :]
        self._ids = self._ids[start:]
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        self.length += len(piece)
        return self._until_stop(piece) if self.stops else piece

    def _until_stop(self, piece: str) -> str:
        text = self._held + piece
        found = [(place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            place, stop = min(found)
            self._held, self.stopped = "", True
            return text[: place + len(stop)] if self._include else text[:place]
        held = max(overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first ones of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
