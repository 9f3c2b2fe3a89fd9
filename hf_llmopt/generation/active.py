"""Who asked for llmopt: the running call, and the handle every optimized model carries as `model.llmopt`."""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..config import LLMOptConfig
from ..engine import EngineLoop, input_weight, unsupported
from ..stats import Stats


@dataclass
class Active:
    """A `generate` call that runs under `llmopt=`.

    Attributes:
        model: The model it was called on; nested calls on other models stay stock.
        config: What it asked for.
        submitted: The call is only to be prepared, for an `Engine`: it ends with `Prepared`.
        settled: The call was served, or its fall-through was reported.
    """

    model: PreTrainedModel
    config: LLMOptConfig
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


class ModelHandle:
    """`model.llmopt`: the default config of later `generate` calls, the engine, and the last call's figures.

    Copies and pickles of a model carry the config only. The engine refers to the model weakly.

    Attributes:
        config: What `generate` without `llmopt=` uses; `None` for stock.
        stats: Figures of the last call that asked for llmopt, or `None`.

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
        key = (replace(config, strict=False), weight.device, weight.dtype, _structure(model))
        latest = self._latest  # read without the lock: who steps the engine holds it for as long as a step takes
        if latest is not None and latest[0] == key and self._model is not None and self._model() is model:
            return latest[1]
        with self._lock:
            if self._model is None or self._model() is not model:
                self._model, self._engines = weakref.ref(model), {}
            if key not in self._engines:
                engine = EngineLoop(model, config, self._lock)
                # Engines nobody is waiting for make way: their pages would only lie about.
                self._engines = {k: e for k, e in self._engines.items() if e.groups or e.owners or e.store.pages_used}
            else:
                engine = self._engines.pop(key)
            self._engines[key] = engine
            self._latest = key, engine
            return engine

    @property
    def engine(self) -> EngineLoop | None:
        """The engine that was used last, or `None`."""
        return next(reversed(self._engines.values()), None)

    def release(self) -> None:
        """Give the memory of all pages back that no running call or returned cache needs."""
        with self._lock:
            self._engines = {k: e for k, e in self._engines.items() if e.groups or e.owners}
            self._latest = None

    def __repr__(self) -> str:
        return f"ModelHandle(config={self.config!r}, stats={self.stats})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHandle:
        return ModelHandle(self.config)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelHandle, (self.config,)


def _structure(model: PreTrainedModel) -> tuple[Any, ...]:
    """What decides which layers there are and how long their keys live; another structure needs another engine."""
    config = model.config.get_text_config(decoder=True)
    names = ("num_hidden_layers", "sliding_window", "attention_chunk_size", "layer_types")
    return tuple(map(id, model.modules())), repr([getattr(config, name, None) for name in names])


def handle_of(model: PreTrainedModel) -> ModelHandle:
    """The model's handle, made on first use."""
    # setdefault is atomic: two threads that ask first at the same time must share one lock.
    handle: ModelHandle = model.__dict__.get("llmopt") or model.__dict__.setdefault("llmopt", ModelHandle())
    return handle
