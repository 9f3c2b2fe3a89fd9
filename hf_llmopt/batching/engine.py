"""`Engine`: submit requests at any time, from any thread; they share every step."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from ..config import LLMOptConfig
from ..errors import (
    EmptyPrompt,
    EngineClosed,
    InvalidOption,
    InvalidRequest,
    LLMOptError,
    RequestCancelled,
    RequestFailed,
    UnsupportedModel,
)
from ..generation import ACTIVE, Active, Group, handle_of
from ..stats import Stats

_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is inside torch while the interpreter goes down would abort the process."""
    for engine in list(_open):
        engine.close()


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
        self._news = threading.Condition()
        self._tokens: list[int] = []
        self._error: LLMOptError | None = None
        self._done = False
        self._group: Group | None = None

    @property
    def stats(self) -> Stats:
        """Figures of this request."""
        assert self._group is not None
        return self._group.stats

    @property
    def done(self) -> bool:
        """Whether the request finished, failed or was cancelled."""
        return self._done

    def __repr__(self) -> str:
        state = f"failed: {self._error}" if self._error else "done" if self._done else "running"
        return f"RequestHandle({len(self._tokens)} tokens, {state})"

    def __iter__(self) -> Iterator[int]:
        """All new tokens from the first on, each as soon as it is sampled.

        Raises:
            LLMOptError: The request failed.
        """
        index = 0
        while (token := self._wait(index)) is not None:
            index += 1
            yield token

    async def __aiter__(self) -> AsyncIterator[int]:
        """All new tokens from the first on, for `async for`."""
        index = 0
        while (token := await asyncio.to_thread(self._wait, index)) is not None:
            index += 1
            yield token

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
            return list(self._tokens)

    def cancel(self) -> None:
        """End the request now and give its pages back; harmless if it has ended."""
        self._engine._end(self, RequestCancelled("The request was cancelled."))

    def _wait(self, index: int) -> int | None:
        """Token `index` once it is there, or `None` if the request ended before."""
        with self._news:
            self._news.wait_for(lambda: self._done or len(self._tokens) > index)
            if len(self._tokens) > index:
                return self._tokens[index]
            if self._error is not None:
                raise self._error
            return None

    def _put(self, tokens: list[int]) -> None:
        with self._news:
            self._tokens += tokens
            self._news.notify_all()

    def _finish(self, error: LLMOptError | None) -> None:
        with self._news:
            if not self._done:
                self._error, self._done = error, True
            self._news.notify_all()


class Engine:
    """A model that serves requests which come and go.

    Each request is what `generate` with one row would be: same arguments, same tokens, its own generator. Requests
    share every forward pass with one another and with `generate` calls of other threads. One thread of the engine
    steps it; it ends when the engine is closed, collected, or the interpreter exits.

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
        ...     prompts = [tokenizer(text)["input_ids"] for text in ("import", "class")]
        ...     handles = [engine.submit(prompt, max_new_tokens=4) for prompt in prompts]
        ...     [len(handle.result()) for handle in handles]
        [4, 4]
    """

    def __init__(self, model: PreTrainedModel, llmopt: Any = True) -> None:
        config = LLMOptConfig.parse(llmopt)
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(f"Engine serves a transformers PreTrainedModel, got {type(model).__name__}.")
        if "llmopt" not in AttentionInterface().valid_keys():
            raise InvalidOption("hf_llmopt is not installed in transformers; call hf_llmopt.install() first.")
        if config is None:
            raise InvalidOption("Engine(model, llmopt=...) needs True, a name, a dict or an LLMOptConfig, not False.")
        self.model = model
        self.config = config
        self.loop = handle_of(model).engine_for(model, config)
        self.loop.owners += 1
        self._waiting: list[RequestHandle] = []
        self._running: list[RequestHandle] = []
        self._closed = False
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        _open.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._running)} running, {len(self._waiting)} waiting"
        return f"Engine({type(self.model).__name__}, {self.config!r}, {state})"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self, input_ids: Tensor | list[int], *, seed: int | None = None, salt: str | None = None, **kwargs: Any
    ) -> RequestHandle:
        """Hand in a request; returns at once.

        Args:
            input_ids: Prompt ids, `[tokens]` or `[1, tokens]`.
            seed: Seed of the request's own noise; random if `None`.
            salt: Share cached prompts only with requests of this salt (a tenant, say); `None` for the config's.
            kwargs: What `model.generate` takes: `max_new_tokens`, `do_sample`, `temperature`, `stop_strings`,
                `logits_processor`, `streamer`, ...

        Raises:
            InvalidRequest: The prompt cannot be generated from, or a processor, criterion or streamer of the user is in
                use by another live request.
            NotServed: The arguments need transformers' own loop.
            OutOfPages: The request could never fit.
            EngineClosed: The engine was closed.
        """
        handle = RequestHandle(self)
        handle._group = group = self._prepare(handle, input_ids, seed, self._config(salt), kwargs)
        with self.loop.lock:
            if self._closed or os.getpid() != self._process:
                raise EngineClosed("The engine was closed, or belongs to the process this one was forked from.")
            if group.engine is not self.loop:
                self._move_to(group)
            self._refuse_shared(group)
            self.loop.check_fits(group)
            self._waiting.append(handle)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_work, args=(weakref.ref(self),), name="hf_llmopt-engine", daemon=True
                )
                self._thread.start()
            self.loop.lock.notify_all()
        return handle

    def _config(self, salt: str | None) -> LLMOptConfig:
        """The engine's config, with the salt of one request."""
        if salt is None:
            return self.config
        if self.config.prompt_cache is None:
            raise InvalidOption(f"salt={salt!r} keeps cached prompts apart, and {self.config!r} has no prompt cache.")
        return replace(self.config, prompt_cache=replace(self.config.prompt_cache, salt=salt))

    def _prepare(
        self,
        handle: RequestHandle,
        input_ids: Tensor | list[int],
        seed: int | None,
        config: LLMOptConfig,
        kwargs: dict[str, Any],
    ) -> Group:
        """Let transformers prepare the call as `generate` would, and take its group instead of running it."""
        if "llmopt" in kwargs:
            raise InvalidOption(
                "llmopt= belongs to Engine(model, llmopt=...); submit takes generate's other arguments."
            )
        try:
            ids = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            given = type(input_ids).__name__
            raise InvalidRequest(
                f"submit takes the token ids of one prompt, got a {given}; tokenizer(text)['input_ids'] gives them."
            ) from error
        ids = ids[None] if ids.dim() == 1 else ids
        if not ids.numel() and "inputs_embeds" not in kwargs:
            raise EmptyPrompt("submit got an empty prompt; give at least one token (the BOS token, say).")
        if ids.dim() != 2 or ids.shape[0] != 1 or (ids.is_floating_point() and ids.numel()):
            raise InvalidRequest(f"submit takes one prompt of token ids, got shape {list(ids.shape)}, {ids.dtype}.")
        if seed is not None and not isinstance(seed, int):
            raise InvalidRequest(f"seed is an int or None, got {seed!r}.")
        generator = torch.Generator(ids.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        # The handle refers to its group, whose callback must not refer back strongly.
        put = weakref.WeakMethod(handle._put)
        submit = {"generator": generator, "on_tokens": lambda tokens: (put() or (lambda _: None))(tokens)}
        token = ACTIVE.set(Active(self.model, config, submit))
        try:
            generate: Any = self.model.generate
            group = generate(ids.to(torch.long), **kwargs)
        finally:
            ACTIVE.reset(token)
        if not isinstance(group, Group):
            raise InvalidOption("hf_llmopt is not installed in transformers; call hf_llmopt.install() first.")
        if len(group.requests) != 1:
            raise InvalidRequest(
                f"submit takes one row, the arguments make {len(group.requests)}; submit it that often."
            )
        return group

    def _move_to(self, group: Group) -> None:
        """The model's weights were moved, cast or exchanged since the last request: go on with its new loop."""
        if self._running or self._waiting:
            raise InvalidRequest(
                "The model was moved, cast or changed while requests of this engine run; wait for them."
            )
        self.loop.owners -= 1
        self.loop = group.engine
        self.loop.owners += 1

    def _refuse_shared(self, group: Group) -> None:
        """Objects of the user may carry state: one in two live requests would mix them up."""
        live = [h._group for h in (*self._waiting, *self._running) if h._group is not None]
        used = {id(item) for other in live for item in other.users_objects()}
        for item in group.users_objects():
            if id(item) in used:
                raise InvalidRequest(
                    f"This {type(item).__name__} is in use by another live request and may carry its state; give each "
                    "request its own."
                )

    def close(self) -> None:
        """End what still runs with `EngineClosed`, and stop the thread. Harmless if closed already."""
        if os.getpid() != self._process:
            return
        with self.loop.lock:
            if not self._closed:
                self.loop.owners -= 1
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

    def _turn(self) -> None:
        """Admit, step, and let every request that has logits choose its token."""
        lock = self.loop.lock
        with lock:
            self._admit()
            if not self._running:
                lock.wait(0.5)
                return
            if not any(map(_ready, self._running)) and not self.loop.step():
                lock.wait(0.05)
            ready = [handle for handle in self._running if _ready(handle)]
        for handle in ready:
            self._advance(handle)

    def _admit(self) -> None:
        while self._waiting:
            handle = self._waiting[0]
            assert handle._group is not None
            handle._group.thread = threading.get_ident()
            try:
                if not handle._group.start():
                    return
            except Exception as error:  # the thread must live on for the other requests
                self._end(handle, _ours(error))
                continue
            self._running.append(self._waiting.pop(0))

    def _advance(self, handle: RequestHandle) -> None:
        group = handle._group
        assert group is not None
        try:
            if group.ready():
                group.advance()
        except Exception as error:  # as above
            self._end(handle, _ours(error))
        else:
            if group.done:
                self._end(handle, None)


def _ready(handle: RequestHandle) -> bool:
    group = handle._group
    assert group is not None
    return any(request.error for request in group.requests) or group.ready()


def _ours(error: Exception) -> LLMOptError:
    return error if isinstance(error, LLMOptError) else RequestFailed.from_forward(error)


def _work(reference: weakref.ref[Engine]) -> None:
    """The engine's thread. It holds the engine only for a turn, so that one that is dropped can be collected."""
    torch.set_grad_enabled(False)  # of this thread
    while True:
        engine = reference()
        if engine is None or engine._closed:
            return
        try:
            engine._turn()
        except Exception as error:
            for handle in list(engine._running):
                engine._end(handle, _ours(error))
        del engine
