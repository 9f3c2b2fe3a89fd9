"""`RequestHandle`: what `submit` returns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..errors import InvalidRequest, LLMOptError
from ..generation import Row, TokenLogprob
from ..stats import Stats


class RequestHandle:
    """A submitted request: iterate over its tokens, wait for its result, or cancel it.

    `for`, `async for`, `result()` and `await` may be used together, and as often as one likes. With
    `num_return_sequences` above 1, only the handles in `choices` have tokens and figures; this one cancels them all,
    and says `InvalidRequest` to everything that would be true of one of them.

    Attributes:
        choices: A handle for each sequence of the request: this one, where there is but one.

    Example:
        >>> from hf_llmopt import Engine, demo
        >>> model, tokenizer = demo.load()
        >>> with Engine(model) as engine:
        ...     handle = engine.submit(tokenizer("import")["input_ids"], max_new_tokens=3)
        ...     tokens = list(handle)
        >>> tokens == handle.result()
        True
    """

    def __init__(self, row: Row, end: Callable[[RequestHandle], None]) -> None:
        self.choices: tuple[RequestHandle, ...] = (self,)
        self._row = row
        self._cancel = end
        self._news = threading.Condition()
        self._watchers: list[Callable[[], object]] = []  # called at the next change, once
        self._enders: list[Callable[[], object]] = []
        self._error: LLMOptError | None = None
        self._done = False

    @property
    def stats(self) -> Stats:
        """Figures of this sequence, up to now while it is `unfinished`."""
        if not self._done:
            self._row.count()
        return self._row.stats

    @property
    def done(self) -> bool:
        """Whether the request finished, failed or was cancelled."""
        return self._done

    @property
    def error(self) -> LLMOptError | None:
        """Why the request failed, or `None`."""
        return self._error

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One entry for each new token so far, with `submit(logprobs=...)`."""
        return self._row.logprobs

    @property
    def prompt_logprobs(self) -> list[TokenLogprob]:
        """One entry for each prompt token but the first, with `submit(prompt_logprobs=...)`."""
        return self._row.prompt_logprobs

    def __repr__(self) -> str:
        state = f"failed: {self._error}" if self._error else "done" if self._done else "running"
        return f"RequestHandle({len(self._row.tokens)} tokens, {state})"

    def __iter__(self) -> Iterator[int]:
        """All new tokens from the first on, each as soon as it is sampled.

        Raises:
            LLMOptError: The request failed.
        """
        index = 0
        while (token := self._next(index)) is not None:
            index += 1
            yield token

    async def __aiter__(self) -> AsyncIterator[int]:
        """All new tokens from the first on, for `async for`."""
        index = 0
        while (token := await self._token_async(index)) is not None:
            index += 1
            yield token

    async def bursts(self) -> AsyncIterator[list[int]]:
        """All new tokens, as many at a time as there are: who is slow wakes up less often.

        Raises:
            LLMOptError: The request failed.
        """
        index = 0
        while await self._token_async(index) is not None:
            tokens = self._row.tokens[index:]
            index += len(tokens)
            yield tokens

    def __await__(self) -> Generator[Any, None, list[int]]:
        """Wait for the end and return all new tokens, as `result` does."""
        return self._result_async().__await__()

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return all new tokens, the EOS token included.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            LLMOptError: The request failed.
            TimeoutError: It did not end in time; it goes on.
        """
        with self._news:
            if not self._news.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"The request did not end within {timeout} s; it goes on.")
            if self._error is not None:
                raise self._error
            return list(self._row.tokens)

    @property
    def pad(self) -> int:
        """The token that `generate` fills rows with behind their end."""
        return 0 if self._row.pad is None else int(self._row.pad)

    def sequence(self) -> Tensor:
        """Wait for the end and return prompt and new tokens, `[length]` on the CPU, as `generate` does.

        Raises:
            LLMOptError: The request failed.
        """
        self.result()
        return self._row.ids()[0].cpu()

    def when_done(self, ender: Callable[[], object]) -> None:
        """Call `ender` in the thread that ends the request, or at once if it has ended."""
        with self._news:
            if not self._done:
                self._enders.append(ender)
                return
        ender()

    def cancel(self) -> None:
        """End the request now and give its pages back; harmless if it has ended."""
        self._cancel(self)

    def _next(self, index: int) -> int | None:
        with self._news:
            self._news.wait_for(lambda: self._has(index))
            return self._token(index)

    def _token(self, index: int) -> int | None:
        """Token `index`, or `None` if the request ended before."""
        if len(self._row.tokens) > index:
            return self._row.tokens[index]
        if self._error is not None:
            raise self._error
        return None

    async def _token_async(self, index: int) -> int | None:
        while not self._has(index):
            await self._change(index)
        return self._token(index)

    async def _result_async(self) -> list[int]:
        while not self._done:
            await self._change(len(self._row.tokens))
        return self.result()

    def _has(self, index: int) -> bool:
        return self._done or len(self._row.tokens) > index

    async def _change(self, index: int) -> None:
        """Wait until token `index` is there or the request ended, without a thread of its own."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._news:
            if self._has(index):
                return
            self._watchers.append(lambda: loop.call_soon_threadsafe(_wake, future))
        await future

    def _tell(self) -> None:
        """There are new tokens, or the request ended."""
        with self._news:
            watchers, self._watchers = self._watchers, []
            self._news.notify_all()
        for watcher in watchers:
            with suppress(RuntimeError):  # the event loop of whoever waited was closed
                watcher()

    def _finish(self, error: LLMOptError | None) -> bool:
        """Set how the request ended; `False` if it had ended before."""
        with self._news:
            if self._done:
                return False
            self._row.count()
            self._error, self._done = error, True
        self._tell()
        for ender in self._enders:
            ender()
        return True


class Choices(RequestHandle):
    """The handle of a request with several sequences.

    Args:
        choices: Theirs.
    """

    def __init__(self, choices: tuple[RequestHandle, ...]) -> None:
        self.choices = choices

    @property
    def done(self) -> bool:
        """Whether all of them have ended."""
        return all(choice.done for choice in self.choices)

    @property
    def error(self) -> LLMOptError | None:
        """Why one of them failed, or `None`."""
        return next((choice.error for choice in self.choices if choice.error is not None), None)

    def cancel(self) -> None:
        """End all of them now; harmless if they have ended."""
        for choice in self.choices:
            choice.cancel()

    def __repr__(self) -> str:
        return f"Choices{self.choices!r}"

    def _one(self) -> Any:
        raise InvalidRequest(
            f"This request has {len(self.choices)} sequences (num_return_sequences), each with a handle of its own: "
            "[choice.result() for choice in handle.choices], for example."
        )

    # All that the rest of a handle reads.
    _row = _news = _done = property(_one)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
