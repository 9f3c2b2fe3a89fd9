"""One answer on its way from the engine to a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import perf_counter

from ..batching import RequestHandle
from ..errors import LLMOptError, RequestCancelled
from ..generation import TokenLogprob
from .metrics import Metrics
from .text import TextStream


@dataclass
class Piece:
    """What became certain at one moment.

    Attributes:
        text: Characters; may be none.
        logprobs: Of the tokens that came.
        offsets: Where in the answer their text begins.
        finish: Why the answer ended, of the last piece: `stop` or `length`.
    """

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None


class Answer:
    """A sequence that the engine generates, as pieces of text.

    Args:
        index: Its number among the choices.
        prompt: Ids of its prompt.
        handle: The engine's.
        text: Turns its tokens into text.
        ends: Tokens that end it.
        length: Most tokens; with 0, one is generated and not shown, for the sake of the prompt's figures.
        metrics: Where it is counted.
        began: When it was asked for, of `perf_counter`.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        handle: RequestHandle,
        text: TextStream,
        ends: frozenset[int],
        length: int,
        metrics: Metrics,
        began: float,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.handle = handle
        self.tokens = 0
        self.first: float | None = None  # seconds to the first token
        self._text = text
        self._ends = ends
        self._length = length
        self._metrics = metrics
        self._began = began
        self._counted = False
        self._ended = False  # by itself: the engine knows

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer, piece by piece; the last one says how it ended.

        Raises:
            LLMOptError: The request failed.
        """
        before = self._began
        try:
            async for token in self.handle:
                now = perf_counter()
                self._metrics.token(now - before, self.first is None)
                if self.first is None:
                    self.first = now - self._began
                before = now
                if self.tokens == self._length:
                    break
                self.tokens += 1
                if token in self._ends:
                    self._ended = True
                    yield self._end("stop")
                    return
                piece = Piece(offsets=[self._text.length])
                piece.text = self._text.add(token)
                if self.handle.logprobs:
                    piece.logprobs = [self.handle.logprobs[self.tokens - 1]]
                yield piece
                if self._text.stopped:
                    yield self._end("stop")
                    return
            yield self._end("length")
        except LLMOptError as error:
            self._count("abort" if isinstance(error, RequestCancelled) else "error")
            raise
        finally:
            self.give_up()

    def give_up(self) -> None:
        """End the request if it runs; the event loop does not wait for the step in which it ends."""
        self._count("abort")
        if not self._ended and not self.handle.done:
            asyncio.get_running_loop().run_in_executor(None, self.handle.cancel)

    def _end(self, reason: str) -> Piece:
        self._count(reason)
        return Piece(self._text.end(), finish=reason)

    def _count(self, reason: str) -> None:
        if not self._counted:
            self._counted = True
            seconds = perf_counter() - self._began
            self._metrics.ended(self.handle.stats, self.tokens, seconds, reason)
