"""The turns of an `Engine`: requests enter, a step runs, tokens are chosen, requests end."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import LLMOptConfig
from ..engine import EngineLoop
from ..errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineFull,
    InvalidRequest,
    LLMOptError,
    ObjectInUse,
    RequestCancelled,
    RequestFailed,
)
from ..generation import Chosen, Row, Wishes, choose, handle_of
from ..kernels import cpu
from .handle import RequestHandle
from .lockstep import Lockstep, Told


class Turns(ABC):
    """The requests of an engine, and the thread that serves them.

    Args:
        model: A causal language model.
        config: What the engine's user asked for.

    Attributes:
        lost: Why no turn can be taken any more, where a process of a sharded model has ended; else `None`.
    """

    def __init__(self, model: PreTrainedModel, config: LLMOptConfig) -> None:
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
        self.lost: str | None = None
        self._lockstep = None if self.loop.ranks is None else Lockstep(self.loop.ranks, self._gate)
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._owned = [self.loop]
        weakref.finalize(self, disown, self._owned)

    @property
    def waiting(self) -> int:
        """Requests that hold no pages yet."""
        untold = 0 if self._lockstep is None else self._lockstep.untold
        return len(self._entering) + untold + len(self.loop.scheduler.line)

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
        disown(self._owned)
        self.loop = loop
        self.loop.owners += 1
        self._owned.append(loop)

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
        row.forget()
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
        except RuntimeError as broken:  # there will be no turn any more
            self._closed = self._over = True
            self.lost = self.lost or f"A rank of the sharded model has ended: {broken}"
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

    @abstractmethod
    def _repeat(self, ids: Tensor, kwargs: dict[str, Any], wishes: Wishes) -> tuple[RequestHandle, ...]:
        """What rank 0 was asked for, on another rank."""

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


def nothing(handle: RequestHandle) -> None:
    """The engine is gone, and ended its requests."""


def _ours(error: BaseException) -> LLMOptError:
    return error if isinstance(error, LLMOptError) else RequestFailed.from_forward(error)


def disown(owned: list[EngineLoop]) -> None:
    """No open engine submits to these loops any more."""
    while owned:
        owned.pop().owners -= 1


def _work(reference: weakref.ref[Turns], live: dict[Row, RequestHandle], lockstep: Lockstep | None) -> None:
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
