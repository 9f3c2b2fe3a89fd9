"""Who asked for llmopt: the running call, and the handle every optimized model carries as `model.llmopt`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..config import LLMOptConfig
from ..engine import EngineLoop, input_weight, unsupported
from ..errors import EmptyPrompt, InvalidOption, InvalidRequest, NotServed, UnsupportedModel
from ..prompt_cache import PromptCache, PromptHandle
from ..quantization import QuantizationReport, QuantizedHead, Quantizer
from ..stats import PromptCacheStats, Stats
from ..walk import modules


@dataclass
class Active:
    """A `generate` call that runs under `llmopt=`.

    Attributes:
        model: The model it was called on; nested calls on other models stay stock.
        config: What it asked for.
        named: The config came with the call's own `llmopt=`; else it is a default.
        submitted: The call is only to be prepared, for an `Engine`: it ends with `Prepared`.
        settled: The call was served, or its fall-through was reported.
    """

    model: PreTrainedModel
    config: LLMOptConfig
    named: bool = False
    submitted: bool = False
    settled: bool = False


class Prepared(Exception):
    """Ends a `generate` call that was only to be prepared.

    Attributes:
        rows: What it would have generated: a row for each of its rows.
    """

    def __init__(self, rows: list[Any]) -> None:
        super().__init__()
        self.rows = rows


ACTIVE: ContextVar[Active | None] = ContextVar("hf_llmopt_active", default=None)


IDLE = 3  # engines without pages that are kept


class ModelHandle:
    """`model.llmopt`: the default config of later `generate` calls, the engine, cached prompts, and figures.

    Copies and pickles of a model carry the config only. The engine refers to the model weakly.

    Attributes:
        config: What `generate` without `llmopt=` uses; `None` for stock.
        stats: Figures of the last call that asked for llmopt, or `None`; of a `BatchingPipeline` or `generate_batch`
            those of the input that was given back last.

    Example:
        >>> import hf_llmopt
        >>> from hf_llmopt import demo
        >>> model, tokenizer = demo.load()
        >>> _ = hf_llmopt.optimize(model, llmopt="kv_cache")
        >>> _ = model.generate(**tokenizer("import", return_tensors="pt"), max_new_tokens=4)
        >>> model.llmopt.stats.served_by
        'llmopt'
    """

    def __init__(self, config: LLMOptConfig | None = None) -> None:
        self.config = config
        self.stats: Stats | None = None
        self._lock = threading.Condition(threading.RLock())
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._engines: dict[Any, EngineLoop] = {}  # the one used last is last
        self._reason: tuple[Any, str | None] | None = None
        self._report: QuantizationReport | None = None  # for when the model is gone
        self._latest: tuple[Any, EngineLoop] | None = None

    def reason_against(self, model: PreTrainedModel) -> str | None:
        """Why the model's class or config rules it out, or `None`; looked up once per config object."""
        if self._reason is None or self._reason[0] is not model.config:
            self._reason = model.config, unsupported(model)
        return self._reason[1]

    def engine_for(self, model: PreTrainedModel, config: LLMOptConfig) -> EngineLoop:
        """The model's engine for a config, made on first use.

        Raises:
            UnsupportedModel: The model cannot be served.
        """
        # Moved or cast weights change what pages hold; a new engine is made, old caches keep their old pages.
        weight = input_weight(model)
        config = _shared(config)
        key = (config, weight.device, weight.dtype, _structure(model))
        latest = self._latest  # read without the lock: who steps the engine holds it for as long as a step takes
        if latest is not None and latest[0] == key and self._model is not None and self._model() is model:
            return latest[1]
        with self._lock:
            self.bind(model)
            engine = self._engines.pop(key, None) or EngineLoop(model, config, self._lock)
            self._make_way(key)
            self._engines[key] = engine
            self._latest = key, engine
            return engine

    def _make_way(self, key: Any) -> None:
        """Engines nobody is waiting for give their pages up, unless their prompts can still be found."""
        idle = [
            k
            for k, e in self._engines.items()
            if not (e.groups or e.owners or e.store.pages_used or (e.prompts and k[1:] == key[1:]))
        ]
        for number, k in enumerate(reversed(idle)):
            engine = self._engines[k]
            if number < IDLE and k[1:] == key[1:] and engine.runner.graphs is None:  # what it has learned is kept
                engine.store.clear()
            else:
                del self._engines[k]

    def bind(self, model: PreTrainedModel) -> None:
        """Belong to this model; engines of another one are given up."""
        if self._model is not None and self._model() is model:
            return  # without the lock, which is held for as long as a step takes
        with self._lock:
            if self._model is None or self._model() is not model:
                self._model, self._engines, self._latest = weakref.ref(model), {}, None

    @property
    def engine(self) -> EngineLoop | None:
        """The engine that was used last, or `None`."""
        return next(reversed(self._engines.values()), None)

    def release(self) -> None:
        """Unpin all prompts, and give back the memory of all pages that no running call or returned cache needs."""
        with self._lock:
            kept = {k: e for k, e in self._engines.items() if e.groups or e.owners}
            for engine in self._engines.values():
                if engine not in kept.values() and engine.prompts is not None:
                    engine.prompts.clear()
            self._engines, self._latest = kept, None

    @property
    def quantization(self) -> QuantizationReport | None:
        """What of the model's weights is quantized, or `None` if nothing is by hf_llmopt.

        Of a model that was deleted, as it was when it was optimized or last asked.
        """
        model = None if self._model is None else self._model()
        if model is not None:
            quantizer = getattr(model, "hf_quantizer", None)
            self._report = quantizer.report(model) if isinstance(quantizer, Quantizer) else None
        return self._report

    def optimized(self, config: LLMOptConfig | None) -> None:
        """Take a new default, and note what of the model is quantized now."""
        self.config = config
        self._report = self.quantization

    @property
    def prompt_cache(self) -> PromptCacheStats | None:
        """Figures of the prompt cache that was used last, or `None` if there is none."""
        with self._lock:
            caches = [engine.prompts for engine in self._engines.values() if engine.prompts is not None]
            return caches[-1].figures() if caches else None

    def weights_changed(self) -> None:
        """Say that weights were written in a way that cannot be seen: cached prompts and the head's copy are stale.

        Steps of torch's optimizers, `load_state_dict`, in-place operations, exchanged tensors and adapters are seen,
        and writes through `.data` that change whole tensors.
        """
        with self._lock:
            for engine in self._engines.values():
                if engine.prompts is not None:
                    engine.prompts.weights_changed()
                engine.runner.weights_changed()
            model = None if self._model is None else self._model()
            for head in (module for module in model.modules() if isinstance(module, QuantizedHead)) if model else ():
                head.forget()

    def cache_prompt(
        self,
        prompt: str | Sequence[int] | Tensor,
        *,
        tokenizer: Any = None,
        ttl: float | None = None,
        llmopt: Any = None,
    ) -> PromptHandle:
        """Compute a prompt now, a system prompt or a document, say, and hold its keys and values for later calls.

        Calls whose prompt begins with the same tokens find them. Text is cut into tokens here alone: where the next
        text is joined to it, the last tokens may differ; all before them are found.

        Args:
            prompt: Text, or token ids `[tokens]` or `[1, tokens]`.
            tokenizer: For text; by default the one that lies beside the model.
            ttl: Seconds after its last use at which the prompt is given up; `None` for the cache's own limit.
            llmopt: As in `generate`; by default the model's own default, else `True`.

        Returns:
            The prompt's handle, pinned.

        Raises:
            InvalidOption: The config has no prompt cache.
            InvalidRequest: The prompt cannot be generated from.
            NotServed: The model runs on stock transformers.
            OutOfPages: The KV cache has no room for the prompt.

        Example:
            >>> import hf_llmopt
            >>> from hf_llmopt import demo
            >>> model, tokenizer = demo.load()
            >>> prompt = hf_llmopt.optimize(model).llmopt.cache_prompt("import os, sys, re, json", tokenizer=tokenizer)
            >>> inputs = tokenizer("import os, sys, re, json, math", return_tensors="pt")
            >>> _ = model.generate(**inputs, max_new_tokens=1)
            >>> model.llmopt.stats.cached_tokens >= len(prompt.tokens) - 1
            True
        """
        model, config = self._served(llmopt)
        if isinstance(prompt, str):
            tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(model.name_or_path)
            prompt = tokenizer(prompt)["input_ids"]
        tokens = _tokens(prompt)
        handle = PromptHandle(self._finds(model, config), self._lock, tokens, *self._computing(model, config))
        handle.pin()
        handle.ttl = ttl
        return handle

    def load_prompt(self, path: str | PathLike[str], *, llmopt: Any = None) -> PromptHandle:
        """Read a prompt that `PromptHandle.save` wrote, in this process or another.

        Args:
            path: The file.
            llmopt: As in `cache_prompt`.

        Returns:
            The prompt's handle, pinned.

        Raises:
            InvalidPromptCache: The file is damaged, or the prompt was computed by another model or other weights.
            OSError: The file cannot be read.
            OutOfPages: The KV cache has no room for the prompt.
        """
        model, config = self._served(llmopt)
        return PromptHandle.load(path, self._finds(model, config), self._lock, *self._computing(model, config))

    def _served(self, llmopt: Any) -> tuple[PreTrainedModel, LLMOptConfig]:
        config = LLMOptConfig.parse(llmopt) if llmopt is not None else self.config or LLMOptConfig.parse(True)
        model = self._model() if self._model is not None else None
        if model is None:
            raise InvalidOption("This handle has no model yet; call hf_llmopt.optimize(model) first.")
        if config is None or config.prompt_cache is None:
            raise InvalidOption(f"{config!r} has no prompt cache; llmopt='prompt_cache' or llmopt=True has one.")
        with suppress(UnsupportedModel):  # whoever computes the prompt will say why
            if self.engine_for(model, config).prompts is None:
                raise NotServed(
                    f"{type(model).__name__} keeps recurrent states, which hold all of a text: no part of a prompt can "
                    "be kept for others."
                )
        return model, config

    def _finds(self, model: PreTrainedModel, config: LLMOptConfig) -> Callable[[], PromptCache | None]:
        reference, own = weakref.ref(model), weakref.ref(self)

        def find() -> PromptCache | None:
            alive, handle = reference(), own()
            return None if alive is None or handle is None else handle.engine_for(alive, config).prompts

        return find

    def _computing(
        self, model: PreTrainedModel, config: LLMOptConfig
    ) -> tuple[str | None, Callable[[list[int]], None]]:
        """The salt, and what computes a prompt's keys: a call that samples one token."""
        assert config.prompt_cache is not None
        reference = weakref.ref(model)

        def compute(tokens: list[int]) -> None:
            alive: Any = reference()
            if alive is None:
                raise ReferenceError("The model of this prompt was deleted.")
            ids = torch.tensor([tokens], device=input_weight(alive).device)
            once = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
            alive.generate(ids, attention_mask=torch.ones_like(ids), **once, llmopt=replace(config, strict=True))

        return config.prompt_cache.salt, compute

    def __repr__(self) -> str:
        return f"ModelHandle(config={self.config!r}, stats={self.stats})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHandle:
        return ModelHandle(self.config)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelHandle, (self.config,)


def _tokens(prompt: Any) -> list[int]:
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequest(
            f"cache_prompt takes text or the ids of one prompt, got a {type(prompt).__name__}."
        ) from error
    ids = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids
    if not ids.numel():
        raise EmptyPrompt("cache_prompt got an empty prompt; give at least one token.")
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise InvalidRequest(f"cache_prompt takes the ids of one prompt, got shape {list(ids.shape)}, {ids.dtype}.")
    tokens: list[int] = ids.tolist()
    return tokens


def _shared(config: LLMOptConfig) -> LLMOptConfig:
    """What decides which engine serves a call: tenants share one, whatever their salt, and so do pipelines."""
    prompts, batching = config.prompt_cache, replace(config.batching, continuous=False)
    prompts = None if prompts is None else replace(prompts, salt=None)
    return replace(config, strict=False, quantization=None, prompt_cache=prompts, batching=batching)


def _structure(model: PreTrainedModel) -> tuple[Any, ...]:
    """What decides which layers there are and how long their keys live; another structure needs another engine."""
    config = model.config.get_text_config(decoder=True)
    names = ("num_hidden_layers", "sliding_window", "attention_chunk_size", "layer_types")
    return tuple(map(id, modules(model))), repr([getattr(config, name, None) for name in names])


def handle_of(model: PreTrainedModel) -> ModelHandle:
    """The model's handle, made on first use."""
    # setdefault is atomic: two threads that ask first at the same time must share one lock.
    handle: ModelHandle = model.__dict__.get("llmopt") or model.__dict__.setdefault("llmopt", ModelHandle())
    handle.bind(model)
    return handle
