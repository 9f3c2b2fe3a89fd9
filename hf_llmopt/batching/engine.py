"""`Engine`: submit requests at any time, from any thread; they share every step."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .. import adapters
from ..config import LLMOptConfig
from ..errors import (
    EmptyPrompt,
    InvalidOption,
    InvalidRequest,
    UnsupportedModel,
)
from ..generation import ACTIVE, Active, Constraint, Prepared, Row, Wishes, require_model
from ..kernels import cpu
from .handle import Choices, RequestHandle
from .lockstep import pack, settled
from .turns import Turns, disown, nothing

_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is inside torch while the interpreter goes down would abort the process."""
    for engine in list(_open):
        engine.close()


class Engine(Turns):
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
        super().__init__(model, config)
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
        """Hand in a request; returns at once. With `num_return_sequences`, read the handles in `RequestHandle.choices`.

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
        return handles[0] if len(handles) == 1 else Choices(handles)

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
        return tuple(RequestHandle(row, lambda handle: (end() or nothing)(handle)) for row in rows)

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
        disown(self._owned)

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

    def _repeat(self, ids: Tensor, kwargs: dict[str, Any], wishes: Wishes) -> tuple[RequestHandle, ...]:
        """What rank 0 was asked for, on another rank."""
        generate: Any = self.model.generate
        return self._make(lambda: generate(ids.to(self.model.device), **kwargs), wishes)
