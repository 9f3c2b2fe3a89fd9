"""One answer on its way from the engine to a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from ..batching import RequestHandle
from ..errors import LLMOptError, RequestCancelled
from ..generation import TokenLogprob
from .metrics import Metrics
from .text import TextStream
from .written import beside


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

    Attributes:
        tokens: New tokens so far, the one that ends the answer included, none behind a stop string.
        first: Seconds from the request to its first token, `None` before.
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
        self.first: float | None = None
        self.text = text
        self._ends = ends
        self._length = length
        self._metrics = metrics
        self._began = began
        self._submitted = perf_counter()  # from then on the engine's own clock runs
        self._counted = False
        self._ended = False  # by itself: the engine knows

    async def pieces(self, at_once: bool = False) -> AsyncIterator[Piece]:
        """The answer, piece by piece; the last one says how it ended.

        Args:
            at_once: Wake up when the request has ended, not for each token. Not for answers with stop strings, which
                would go on behind them.

        Raises:
            LLMOptError: The request failed.
        """
        before = self._began
        self._metrics.began(self.handle.stats)
        try:
            if at_once:
                await self._over()
            async for tokens in self.handle.bursts():
                before, piece = await beside(len(tokens), partial(self._read, before, tokens, at_once))
                yield piece
                if piece.finish:
                    return
            yield self._end(Piece(), "length")
        except LLMOptError as error:
            self._count("abort" if isinstance(error, RequestCancelled) else "error")
            raise
        finally:
            self.give_up()

    async def _over(self) -> None:
        """Wait until the request has ended."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the event loop was closed
                loop.call_soon_threadsafe(over.set)

        self.handle.when_done(tell)
        await over.wait()

    def _read(self, before: float, tokens: list[int], at_once: bool) -> tuple[float, Piece]:
        """The time, and what these tokens add."""
        return self._clock(before, len(tokens), at_once), self._piece(tokens)

    def _clock(self, before: float, tokens: int, at_once: bool) -> float:
        """Note when tokens came; those that came together are taken for evenly spaced. Returns the time."""
        now = perf_counter()
        if self.first is None:
            # Whoever waits for the end does not see the first token come; the engine did.
            came = min(now, self._submitted + self.handle.stats.time_to_first_token) if at_once else now
            self.first = came - self._began
            self._metrics.token(self.first, first=True)
            before, tokens = came, tokens - 1
        for _ in range(tokens):
            self._metrics.token((now - before) / tokens, first=False)
        return now

    def _piece(self, tokens: list[int]) -> Piece:
        """What these tokens add."""
        room = self._length - self.tokens
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        shown = tokens[: room if end is None else min(end, room)]
        piece = Piece()
        if not self.text.stops and not self.handle.logprobs:
            self.tokens += len(shown)
            piece.text = self.text.add(*shown)
        else:
            for token in shown:
                piece.offsets.append(self.text.length)
                piece.logprobs += self.handle.logprobs[self.tokens : self.tokens + 1]
                self.tokens += 1
                piece.text += self.text.add(token)
                if self.text.stopped:
                    return self._end(piece, "stop")
        if end is not None and end < room:
            self._ended = True
            self.tokens += 1
            return self._end(piece, "stop")
        return piece

    def give_up(self) -> None:
        """End the request if it runs; the event loop does not wait for the step in which it ends."""
        self._count("abort")
        if not self._ended and not self.handle.done:
            asyncio.get_running_loop().run_in_executor(None, self.handle.cancel)

    def _end(self, piece: Piece, reason: str) -> Piece:
        self._count(reason)
        piece.text += self.text.end()
        piece.finish = reason
        return piece

    def _count(self, reason: str) -> None:
        if not self._counted:
            self._counted = True
            seconds = perf_counter() - self._began
            self._metrics.ended(self.handle.stats, self.tokens, seconds, reason)
