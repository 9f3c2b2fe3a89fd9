"""`Engine`: submit requests at any time, from any thread; they share every step."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .. import adapters
from ..config import LLMOptConfig
from ..engine import EngineLoop
from ..errors import (
    DeadlineExceeded,
    EmptyPrompt,
    EngineClosed,
    EngineFull,
    InvalidOption,
    InvalidRequest,
    LLMOptError,
    ObjectInUse,
    RequestCancelled,
    RequestFailed,
    UnsupportedModel,
)
from ..generation import ACTIVE, Active, Chosen, Constraint, Prepared, Row, Wishes, choose, handle_of, require_model
from ..kernels import cpu
from .handle import RequestHandle
from .lockstep import Lockstep, Told, pack, settled

_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is inside torch while the interpreter goes down would abort the process."""
    for engine in list(_open):
        engine.close()


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
        require_model(model, "Engine serves")
        if "llmopt" not in AttentionInterface().valid_keys():
            raise InvalidOption("hf_llmopt is not installed in transformers; call hf_llmopt.install() first.")
        if config is None:
            raise InvalidOption("Engine(model, llmopt=...) needs True, a name, a dict or an LLMOptConfig, not False.")
        self.model = model
        self.config = config
        self.loop = handle_of(model).engine_for(model, config)
        self.loop.owners += 1
        # `gate` guards what `submit` touches. The loop's lock, which is held for whole steps, is never taken inside it.
        self._gate = threading.Condition()
        self._entering: deque[RequestHandle] = deque()  # submitted, not yet in the loop
        self._live: dict[Row, RequestHandle] = {}
        self._deadlines: dict[Row, float] = {}
        self._objects: set[int] = set()  # ids of the users' objects in live requests
        self._ready: list[Row] = []  # rows with logits or errors; guarded by the loop's lock
        self._ahead: Chosen | None = None  # tokens of the last step, which the host does not know yet
        self._closed = False
        self._over = False  # no further turn
        self._lockstep = None if self.loop.ranks is None else Lockstep(self.loop.ranks, self._gate)
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._owned = [self.loop]
        weakref.finalize(self, _disown, self._owned)
        _open.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._live)} requests, {self.waiting} waiting"
        return f"Engine({type(self.model).__name__}, {self.config!r}, {state})"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Requests that hold no pages yet."""
        untold = 0 if self._lockstep is None else self._lockstep.untold
        return len(self._entering) + untold + len(self.loop.scheduler.line)

    def submit(
        self,
        input_ids: Tensor | list[int],
        *,
        seed: int | None = None,
        salt: str | None = None,
        priority: int = 0,
        tenant: str = "",
        adapter: str | None = None,
        deadline: float | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        constraint: Callable[[], Constraint] | None = None,
        **kwargs: Any,
    ) -> RequestHandle:
        """Hand in a request; returns at once.

        Args:
            input_ids: Prompt ids, `[tokens]` or `[1, tokens]`.
            seed: Seed of the request's own noise; random if `None`. With `num_return_sequences`, sequence `i` is what
                `seed + i` gives.
            salt: Share cached prompts only with requests of this salt (a tenant, say); `None` for the config's.
            priority: Under the policy `"priority"`: higher goes first, -100 to 100.
            tenant: Under the policy `"fair"`: whose request it is.
            adapter: Name of the LoRA adapter that this request goes through, whatever is active in the model;
                `"__base__"` for none. Requests with different adapters share a pass.
            deadline: Seconds from now after which the request ends with `DeadlineExceeded`.
            logprobs: Report the log-probability of each new token, and of that many most likely ones.
            prompt_logprobs: The same for each prompt token but the first; the whole prompt is computed.
            logit_bias: Added to the scores of these token ids.
            frequency_penalty: Subtracted from a token's score for each time it was generated.
            presence_penalty: Subtracted from the scores of tokens that were generated.
            constraint: Called once for each sequence: makes what says which tokens may come next.
            kwargs: What `model.generate` takes: `max_new_tokens`, `do_sample`, `temperature`, `stop_strings`,
                `logits_processor`, `streamer`, `num_return_sequences`, ...

        Raises:
            InvalidRequest: The prompt cannot be generated from.
            ObjectInUse: A processor, criterion or streamer of the user serves another live request.
            NotServed: The arguments need transformers' own loop.
            OutOfPages: The request could never fit.
            EngineFull: Too many requests wait.
            EngineClosed: The engine was closed.
        """
        wishes = Wishes(
            seed,
            salt,
            priority,
            tenant,
            adapter,
            deadline,
            logprobs,
            prompt_logprobs,
            logit_bias,
            frequency_penalty,
            presence_penalty,
            constraint,
        )
        if "llmopt" in kwargs:
            raise InvalidOption(
                "llmopt= belongs to Engine(model, llmopt=...); submit takes generate's other arguments."
            )
        ids = self._ids(input_ids, "inputs_embeds" in kwargs)
        generate: Any = self.model.generate
        packed = None
        if self._lockstep is not None:
            self._lockstep.require_leader()
            wishes = settled(wishes)
            packed = pack(ids, kwargs, wishes)
        return self.submit_call(lambda: generate(ids, **kwargs), wishes, packed)

    def submit_call(self, call: Callable[[], Any], wishes: Wishes, packed: bytes | None = None) -> RequestHandle:
        """Hand in what a function would generate.

        Args:
            call: Calls `generate` of this engine's model, for one prompt. It does not return from that.
            wishes: What is asked for beyond the arguments of `generate`.
            packed: The same for the other processes of a sharded model.

        Raises:
            LLMOptError: As `submit`.
        """
        if self._lockstep is not None and packed is None:
            raise UnsupportedModel(
                "The model is sharded over processes, which a pipeline cannot tell of its inputs. Use Engine.submit or "
                "generate_batch on rank 0, and Engine.follow on the others."
            )
        handles = self._make(call, wishes)
        with self._gate:
            self._enqueue(handles, packed)
        cpu.rest()  # from here on the engine's thread computes, not this one
        return handles[0]

    def _make(self, call: Callable[[], Any], wishes: Wishes) -> tuple[RequestHandle, ...]:
        if wishes.logit_bias and max(wishes.logit_bias) >= (size := self.model.config.get_text_config().vocab_size):
            raise InvalidRequest(f"logit_bias names token {max(wishes.logit_bias)}; the model's ids are below {size}.")
        if wishes.adapter is not None:
            adapters.check(self.model, wishes.adapter)
        rows = self._prepare(call, self.config_for(wishes))
        for index, row in enumerate(rows):
            generator = torch.Generator(row.input_ids.device)
            if wishes.seed is None:
                generator.seed()
            else:
                generator.manual_seed(wishes.seed + index)
            row.wish(wishes, generator)
        end = weakref.WeakMethod(self._cancel)
        handles = tuple(RequestHandle(row, lambda handle: (end() or _nothing)(handle)) for row in rows)
        for handle in handles:
            handle.choices = handles
        return handles

    def _ids(self, input_ids: Tensor | list[int], has_embeds: bool) -> Tensor:
        try:
            ids = torch.as_tensor(input_ids, device=self.model.device)
        except (TypeError, ValueError, RuntimeError) as error:
            given = type(input_ids).__name__
            raise InvalidRequest(
                f"submit takes the token ids of one prompt, got a {given}; tokenizer(text)['input_ids'] gives them."
            ) from error
        ids = ids[None] if ids.dim() == 1 else ids
        if not ids.numel() and not has_embeds:
            raise EmptyPrompt("submit got an empty prompt; give at least one token (the BOS token, say).")
        if ids.dim() != 2 or ids.shape[0] != 1 or (ids.is_floating_point() and ids.numel()):
            raise InvalidRequest(f"submit takes one prompt of token ids, got shape {list(ids.shape)}, {ids.dtype}.")
        return ids.to(torch.long)

    def config_for(self, wishes: Wishes) -> LLMOptConfig:
        """The engine's config, with the salt of one request.

        Raises:
            InvalidOption: There is a salt, and no prompt cache.
        """
        salt = wishes.salt
        if salt is None:
            return self.config
        if self.config.prompt_cache is None:
            raise InvalidOption(f"salt={salt!r} keeps cached prompts apart, and {self.config!r} has no prompt cache.")
        return replace(self.config, prompt_cache=replace(self.config.prompt_cache, salt=salt))

    def _prepare(self, call: Callable[[], Any], config: LLMOptConfig) -> list[Row]:
        """Let transformers prepare a call as `generate` would, and take its rows instead of running them."""
        token = ACTIVE.set(Active(self.model, config, submitted=True))
        try:
            call()
        except Prepared as prepared:
            return prepared.rows
        finally:
            ACTIVE.reset(token)
        raise InvalidOption("hf_llmopt is not installed in transformers; call hf_llmopt.install() first.")

    def _enqueue(self, handles: tuple[RequestHandle, ...], packed: bytes | None = None) -> None:
        rows = [handle._row for handle in handles]
        if self._closed or os.getpid() != self._process:
            raise EngineClosed("The engine was closed, or belongs to the process this one was forked from.")
        if rows[0].engine is not self.loop:
            self._move_to(rows[0].engine)
        objects = rows[0].users_objects()
        for item in objects:
            # Objects of the user may carry state: one in two live requests would mix them up.
            if id(item) in self._objects:
                raise ObjectInUse(
                    f"This {type(item).__name__} is in use by another live request and may carry its state; give each "
                    "request its own."
                )
        for row in rows:
            self.loop.budget.check_fits(row)
        limit = self.config.batching.max_waiting
        if self.waiting + len(rows) > limit:
            raise EngineFull(
                f"{self.waiting} requests wait, and BatchingConfig(max_waiting={limit}) allows no more. Wait for "
                "results before you submit again, or raise max_waiting."
            )
        self._objects |= set(map(id, objects))
        for handle in handles:
            row = handle._row
            row.on_notice = self._ready.append
            self._live[row] = handle
            if row.wishes.deadline is not None:
                self._deadlines[row] = monotonic() + row.wishes.deadline
        if self._lockstep is not None and packed is not None:
            self._lockstep.came.append((packed, handles))
        else:
            self._entering.extend(handles)
        if self._thread is None and (self._lockstep is None or self._lockstep.leads):
            self._thread = threading.Thread(
                target=_work, args=(weakref.ref(self), self._live, self._lockstep), name="hf_llmopt-engine", daemon=True
            )
            self._thread.start()
        self._gate.notify_all()

    def _move_to(self, loop: EngineLoop) -> None:
        """The model's weights were moved, cast or exchanged since the last request: go on with its new loop."""
        if self._live:
            raise InvalidRequest(
                "The model was moved, cast or changed while requests of this engine run; wait for them."
            )
        _disown(self._owned)
        self.loop = loop
        self.loop.owners += 1
        self._owned.append(loop)

    def close(self) -> None:
        """End what still runs with `EngineClosed`, and stop the thread. Harmless if closed already."""
        if os.getpid() != self._process:
            return
        with self._gate:
            self._closed = True
            thread = self._thread
            self._gate.notify_all()
        if self._lockstep is None:
            self._end_all()
        elif thread is None and self._lockstep.leads and not self._over:
            with suppress(RuntimeError):  # the others have ended before
                self._agree()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        _disown(self._owned)

    def follow(self) -> None:
        """On every rank of a sharded model but rank 0: take part until rank 0 closes its engine.

        Raises:
            InvalidOption: The model is not sharded, or this is rank 0.
            RuntimeError: Rank 0 has ended.
        """
        if self._lockstep is None or self._lockstep.leads:
            raise InvalidOption("Only the ranks of a sharded model follow, and all but rank 0: there, call submit.")
        with torch.no_grad():
            while not self._over:
                self._turn()

    def _end_all(self) -> None:
        for handle in list(self._live.values()):
            self._end(handle, EngineClosed("The engine was closed before the request finished."))

    def _cancel(self, handle: RequestHandle) -> None:
        self._give_up(handle, RequestCancelled("The request was cancelled."))

    def _give_up(self, handle: RequestHandle, error: LLMOptError) -> None:
        if self._lockstep is None:
            self._end(handle, error)
            return
        with self._gate:
            self._lockstep.gone.append((handle, error))
            self._gate.notify_all()

    def _end(self, handle: RequestHandle, error: LLMOptError | None) -> None:
        row = handle._row
        with self.loop.lock:
            self.loop.remove(row)
        with self._gate:
            if handle in self._entering:
                self._entering.remove(handle)
            self._live.pop(row, None)
            self._deadlines.pop(row, None)
            if self._lockstep is not None:
                self._lockstep.numbers.pop(handle, None)
            self._objects -= set(map(id, row.users_objects()))
        handle._finish(error)

    def _turn(self) -> None:
        """Let new requests in, step, and choose the next tokens of all requests that have logits.

        Where the device runs beside the CPU, a step is launched before the host knows the tokens that the step before
        chose: they are read, and what follows from them is done, while the device is busy.
        """
        follows = self._lockstep is not None and not self._lockstep.leads
        with self._gate:
            if not self._live and not self._closed and not follows:
                cpu.rest()  # threads that wait for nothing slow down all others
                self._gate.wait(0.5)
            idle = not self._live and not self._closed
        if self._lockstep is not None and ((idle and not follows) or not self._agree()):
            return
        lock = self.loop.lock
        with lock:
            self._enter()
            self._expire()
            if not self._ready and self._live and not self.loop.step() and self._ahead is None:
                lock.wait(0.05)
            # Logits are taken along: those of a request that is cancelled from now on would be gone.
            ready = [(row, [row.request.logits, *row.request.later], row.request.error) for row in self._ready]
            self._ready.clear()
        if self._ahead is not None:
            chosen, self._ahead = self._ahead, None
            self._accept(chosen)
        for row, _, error in ready:
            if error is not None and (handle := self._live.get(row)) is not None:
                self._end(handle, _ours(error))
        # Without logits: cancelled, but not yet taken out.
        going = [(row, logits) for row, logits, _ in ready if logits[0] is not None and row in self._live]
        if not going:
            return
        chosen = choose([row for row, _ in going], [logits for _, logits in going])
        if self.loop.overlaps:
            with lock:
                chosen.go_on()
            self._ahead = chosen
        else:
            self._accept(chosen)

    def _agree(self) -> bool:
        """Let all ranks of a sharded model take the same turn; `False` if it was the last."""
        assert self._lockstep is not None
        try:
            told = self._lockstep.turn(self._closed, self._repeat)
        except RuntimeError:  # a rank has ended: there will be no turn any more
            self._closed = self._over = True
            raise
        with self._gate:
            for handles in told.came:
                if self._lockstep.leads:
                    self._entering.extend(handles)
                else:
                    self._enqueue(handles)
        for handle, error in told.gone:
            self._end(handle, error)
        if told.closes:
            self._closed = self._over = True
            self._end_all()
        return not told.closes

    def _repeat(self, ids: Tensor, kwargs: dict[str, Any], wishes: Wishes) -> tuple[RequestHandle, ...]:
        """What rank 0 was asked for, on another rank."""
        generate: Any = self.model.generate
        return self._make(lambda: generate(ids.to(self.model.device), **kwargs), wishes)

    def _accept(self, chosen: Chosen) -> None:
        """Hand requests their tokens, and end those that are done."""
        chosen.accept()
        for row, failed in zip(chosen.rows, chosen.errors, strict=True):
            handle = self._live.get(row)
            if handle is None:
                continue  # cancelled meanwhile
            if failed is not None or row.done:
                self._end(handle, None if failed is None else _ours(failed))
            else:
                handle._tell()

    def _enter(self) -> None:
        if self._entering:
            self.loop.refresh()
        while self._entering:
            handle = self._entering.popleft()
            row = handle._row
            row.thread = threading.get_ident()
            try:
                if not row.request.finished and not row.start():
                    self._entering.appendleft(handle)
                    break  # it brings keys of its own, for which there is no room yet
            except Exception as error:  # the thread must live on for the other requests
                self._end(handle, _ours(error))

    def _expire(self) -> None:
        now = monotonic()
        for row in [row for row, at in list(self._deadlines.items()) if at <= now]:
            handle = self._live.get(row)
            del self._deadlines[row]
            if handle is not None:
                seconds, tokens = row.wishes.deadline, len(row.tokens)
                self._give_up(
                    handle, DeadlineExceeded(f"The deadline of {seconds} s passed after {tokens} new tokens.")
                )


def _nothing(handle: RequestHandle) -> None:
    """The engine is gone, and ended its requests."""


def _ours(error: BaseException) -> LLMOptError:
    return error if isinstance(error, LLMOptError) else RequestFailed.from_forward(error)


def _disown(owned: list[EngineLoop]) -> None:
    """No open engine submits to these loops any more."""
    while owned:
        owned.pop().owners -= 1


def _work(reference: weakref.ref[Engine], live: dict[Row, RequestHandle], lockstep: Lockstep | None) -> None:
    """The engine's thread. It holds the engine only for a turn, so that one that is dropped can be collected."""
    torch.set_grad_enabled(False)  # of this thread
    while True:
        engine = reference()
        if engine is None:
            for row, handle in list(live.items()):
                with row.engine.lock:
                    row.engine.remove(row)
                handle._finish(EngineClosed("The engine was dropped while the request ran: keep it, or use `with`."))
            with suppress(RuntimeError):
                if lockstep is not None:
                    lockstep.share(Told(closes=True))
            return
        if engine._over or (engine._closed and lockstep is None):
            return
        try:
            engine._turn()
        except BaseException as error:
            for handle in list(engine._live.values()):
                engine._end(handle, _ours(error))
        del engine
