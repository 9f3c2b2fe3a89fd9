"""`Engine`: submit requests at any time, from any thread; they share every step."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import LLMOptConfig
from ..errors import EngineClosed, InvalidOption, InvalidRequest, LLMOptError, RequestCancelled
from ..generation import ACTIVE, Active, Group, handle_of
from ..stats import Stats

_END = object()


class RequestHandle:
    """A submitted request: iterate over its tokens, wait for its result, or cancel it.

    Example:
        >>> from hf_llmopt import Engine, demo
        >>> model, tokenizer = demo.load()
        >>> with Engine(model) as engine:
        ...     handle = engine.submit(tokenizer("import")["input_ids"], max_new_tokens=3)
        ...     tokens = list(handle)
        >>> tokens == handle.result()
        True
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._finished = threading.Event()
        self._tokens: list[int] = []
        self._error: LLMOptError | None = None
        self._group: Group | None = None

    @property
    def stats(self) -> Stats:
        """Figures of this request."""
        assert self._group is not None
        return self._group.stats

    @property
    def done(self) -> bool:
        """Whether the request finished, failed or was cancelled."""
        return self._finished.is_set()

    def __iter__(self) -> Iterator[int]:
        """New tokens as they are sampled. May be iterated once.

        Raises:
            LLMOptError: The request failed.
        """
        while (item := self._queue.get()) is not _END:
            yield item
        self._raise()

    async def __aiter__(self) -> AsyncIterator[int]:
        """New tokens as they are sampled, for `async for`. May be iterated once."""
        while (item := await asyncio.to_thread(self._queue.get)) is not _END:
            yield item
        self._raise()

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return all new tokens, the EOS token included.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            LLMOptError: The request failed.
            TimeoutError: It did not end in time; it goes on.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"The request did not end within {timeout} s; it goes on.")
        self._raise()
        return list(self._tokens)

    def cancel(self) -> None:
        """End the request now and give its pages back; harmless if it has ended."""
        self._engine._end(self, RequestCancelled("The request was cancelled."))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _put(self, tokens: list[int]) -> None:
        self._tokens += tokens
        for token in tokens:
            self._queue.put(token)

    def _finish(self, error: LLMOptError | None) -> None:
        if not self._finished.is_set():
            self._error = error
            self._finished.set()
            self._queue.put(_END)


class Engine:
    """A model that serves requests which come and go.

    Each request is what `generate` with one row would be: same arguments, same tokens, its own generator. Requests
    share
    every forward pass with one another and with `generate` calls of other threads. One thread of the engine steps it.

    Args:
        model: A causal language model.
        llmopt: Any form of the keyword but `False`.

    Raises:
        InvalidOption: The keyword names something that does not exist.
        UnsupportedModel: The model cannot be served.

    Example:
        >>> from hf_llmopt import Engine, demo
        >>> model, tokenizer = demo.load()
        >>> with Engine(model) as engine:
        ...     handles = [engine.submit(tokenizer(text)["input_ids"], max_new_tokens=4) for text in ("import",
        "class")] ...     [len(handle.result()) for handle in handles]
        [4, 4]
    """

    def __init__(self, model: PreTrainedModel, llmopt: Any = True) -> None:
        config = LLMOptConfig.parse(llmopt)
        if config is None:
            raise InvalidOption("Engine(model, llmopt=...) needs True, a name, a dict or an LLMOptConfig, not False.")
        self.model = model
        self.config = config
        self.loop = handle_of(model).engine_for(model, config)
        self._waiting: list[RequestHandle] = []
        self._running: list[RequestHandle] = []
        self._closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, input_ids: Tensor | list[int], *, seed: int | None = None, **kwargs: Any) -> RequestHandle:
        """Hand in a request; returns at once.

        Args:
            input_ids: Prompt ids, `[tokens]` or `[1, tokens]`.
            seed: Seed of the request's own noise; random if `None`.
            kwargs: What `model.generate` takes: `max_new_tokens`, `do_sample`, `temperature`, `stop_strings`,
                `logits_processor`, `streamer`, ...

        Raises:
            InvalidRequest: The prompt cannot be generated from.
            NotServed: The arguments need transformers' own loop.
            OutOfPages: The request could never fit.
            EngineClosed: The engine was closed.
        """
        ids = torch.as_tensor(input_ids)
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.is_floating_point():
            raise InvalidRequest(f"submit takes one prompt of token ids, got shape {list(ids.shape)}, {ids.dtype}.")
        if ids.shape[1] == 0 and "inputs_embeds" not in kwargs:
            raise InvalidRequest("submit got an empty prompt; give at least one token (the BOS token, say).")
        handle = RequestHandle(self)
        generator = torch.Generator(ids.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        token = ACTIVE.set(Active(self.model, self.config, {"generator": generator, "on_tokens": handle._put}))
        try:
            generate: Any = self.model.generate
            group = generate(ids.to(torch.long), **kwargs)
        finally:
            ACTIVE.reset(token)
        if not isinstance(group, Group):
            raise InvalidOption("hf_llmopt is not installed in transformers; call hf_llmopt.install() first.")
        handle._group = group
        with self.loop.lock:
            if self._closed:
                raise EngineClosed("The engine was closed.")
            self.loop.check_fits(group)
            self._waiting.append(handle)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hf_llmopt-engine", daemon=True)
                self._thread.start()
            self.loop.lock.notify_all()
        return handle

    def close(self) -> None:
        """End what still runs with `EngineClosed`, and stop the thread. Harmless if closed already."""
        with self.loop.lock:
            self._closed = True
            for handle in (*self._waiting, *self._running):
                self._end(handle, EngineClosed("The engine was closed before the request finished."))
            self.loop.lock.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _end(self, handle: RequestHandle, error: LLMOptError | None) -> None:
        with self.loop.lock:
            for handles in (self._waiting, self._running):
                if handle in handles:
                    handles.remove(handle)
            if handle._group is not None:
                self.loop.remove(handle._group)
            handle._finish(error)

    def _work(self) -> None:
        """The engine's thread: admit, step, and let every request that has logits choose its token."""
        lock = self.loop.lock
        while True:
            with lock:
                if self._closed:
                    return
                self._admit()
                if not self._running:
                    lock.wait()
                    continue
                if not any(self._ready(handle) for handle in self._running) and not self.loop.step():
                    lock.wait(0.05)
                ready = [handle for handle in self._running if self._ready(handle)]
            for handle in ready:
                self._advance(handle)

    def _admit(self) -> None:
        while self._waiting:
            handle = self._waiting[0]
            assert handle._group is not None
            try:
                if not handle._group.start():
                    return
            except LLMOptError as error:
                self._end(handle, error)
                continue
            self._running.append(self._waiting.pop(0))

    def _ready(self, handle: RequestHandle) -> bool:
        assert handle._group is not None
        return any(request.error for request in handle._group.requests) or handle._group.ready()

    def _advance(self, handle: RequestHandle) -> None:
        group = handle._group
        assert group is not None
        try:
            if group.ready():
                group.advance()
        except LLMOptError as error:
            self._end(handle, error)
        except BaseException as error:  # the thread must live on for the other requests
            failed = LLMOptError(f"The request failed with {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._end(handle, failed)
        else:
            if group.done:
                self._end(handle, None)
