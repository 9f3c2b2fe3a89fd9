"""Teach transformers the keyword `llmopt=`. The only module that sets an attribute on transformers.

`install` wraps six methods and a function, and replaces one registry entry; each wrapper passes everything through
unless `llmopt=` is given or the model carries a default. `uninstall` puts the very same objects back.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TextGenerationPipeline, modeling_utils, pipelines
from transformers.generation import GenerationMixin
from transformers.pipelines import PIPELINE_REGISTRY

from . import attention, quantization
from .batching import BatchingPipeline
from .config import LLMOptConfig
from .errors import InstallConflict, InvalidOption, NotServed, UnsupportedModel
from .generation import ACTIVE, Active, Prepared, handle_of, named_drafter, require_model, translate
from .stats import Stats

_TASK = "text-generation"
_patches: list[tuple[Any, str, Any, Any]] = []  # (owner, name, original, ours)


def install() -> None:
    """Add the keyword `llmopt=` to transformers. Calling it twice is the same as calling it once.

    Example:
        >>> import hf_llmopt
        >>> hf_llmopt.install()
    """
    if _patches:
        return
    attention.register()
    for owner, name, wrap in (
        (PreTrainedModel, "from_pretrained", _from_pretrained),
        (PreTrainedConfig, "from_dict", _from_dict),
        (GenerationMixin, "generate", _generate),
        (GenerationMixin, "_sample", _loop(_serve)),
        (GenerationMixin, "_assisted_decoding", _loop(_assisted)),
        (GenerationMixin, "_beam_search", _loop(partial(_not_served, "beam search"))),
        (modeling_utils, "get_hf_quantizer", quantization.answering),
    ):
        original = vars(owner)[name]
        ours = wrap(original)
        setattr(owner, name, ours)
        _patches.append((owner, name, original, ours))
    entry = PIPELINE_REGISTRY.supported_tasks[_TASK]
    _patches.append((entry, "impl", entry["impl"], _TextGenerationPipeline))
    entry["impl"] = _TextGenerationPipeline


def uninstall() -> None:
    """Remove the keyword and put the original objects back.

    Raises:
        InstallConflict: Another library patched one of them afterwards; nothing was changed.

    Example:
        >>> import hf_llmopt
        >>> hf_llmopt.uninstall()
        >>> hf_llmopt.install()
    """
    for owner, name, _, ours in _patches:
        if (owner.get(name) if isinstance(owner, dict) else vars(owner).get(name)) is not ours:
            raise InstallConflict(f"{owner!r}'s {name!r} was patched after hf_llmopt; undo that patch first.")
    while _patches:
        owner, name, original, _ = _patches.pop()
        if isinstance(owner, dict):
            owner[name] = original
        else:
            setattr(owner, name, original)


def optimize(model: PreTrainedModel, llmopt: Any = True) -> PreTrainedModel:
    """Set what later `generate` calls of a loaded model use; quantize its weights if that is asked for.

    Args:
        model: Changed in place: it gets the attribute `llmopt`.
        llmopt: Any form of the keyword; `False` goes back to stock.

    Returns:
        The same model.

    Raises:
        InvalidOption: The keyword names something that does not exist.
        UnsupportedModel: The model has a `generate` or a sampling loop of its own.

    Example:
        >>> import hf_llmopt
        >>> from hf_llmopt import demo
        >>> model, tokenizer = demo.load()
        >>> hf_llmopt.optimize(model, llmopt="kv_cache") is model
        True
    """
    config = LLMOptConfig.parse(llmopt)
    require_model(model, "llmopt= optimizes")
    if config is not None:
        _require_stock_loop(model)
        if config.quantization is not None and not quantization.has(model, config.quantization):
            quantization.quantize(model, config.quantization)
    handle_of(model).optimized(config)
    return model


def _require_stock_loop(model: PreTrainedModel) -> None:
    if not isinstance(model, GenerationMixin):
        raise UnsupportedModel(
            f"{type(model).__name__} has no generate(): it is a model without a language-model head. Load it with "
            "AutoModelForCausalLM."
        )
    for name in ("generate", "_sample"):
        if getattr(type(model), name, None) is not getattr(GenerationMixin, name):
            raise UnsupportedModel(
                f"{type(model).__name__} defines its own {name}(), which llmopt= cannot replace. "
                "Load the model without llmopt=."
            )


def _from_pretrained(original: Any) -> Any:
    @wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, llmopt: Any = None, **kwargs: Any) -> Any:
        config = LLMOptConfig.parse(llmopt)  # before anything is loaded
        token = quantization.LOADING.set(config or _pipelines_config(kwargs.get("config")))
        try:
            model = original.__func__(cls, *args, **kwargs)
        except quantization.Unloadable as stopped:
            raise stopped.error from None
        finally:
            quantization.LOADING.reset(token)
        loaded = model[0] if isinstance(model, tuple) else model  # output_loading_info=True
        if config is not None or (llmopt is False and "llmopt" in vars(loaded)):  # whose class has a default
            optimize(loaded, config)
        return model

    wrapped: Any = from_pretrained
    return classmethod(wrapped)


def _from_dict(original: Any) -> Any:
    """What a config.json says of quantization is looked at before transformers fails on it, far from the cause."""

    @wraps(original.__func__)
    def from_dict(cls: Any, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("llmopt") or quantization.LOADING.get() is not None:  # an Auto class reads the config first
            quantization.require_entry(config_dict)
        return original.__func__(cls, config_dict, *args, **kwargs)

    wrapped: Any = from_dict
    return classmethod(wrapped)


def _pipelines_config(model_config: Any) -> LLMOptConfig | None:
    """What a running `pipeline(..., llmopt=)` asks for, where its model's files are quantized.

    transformers hands the keyword to the pipeline's class alone, once the model is loaded; full weights wait for that,
    and so does the error of a keyword that cannot be parsed, which transformers would bury in one of its own.
    """
    if not quantization.stored_quantized(model_config):
        return None
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not pipelines.pipeline.__code__:
        frame = frame.f_back
    if frame is None or frame.f_locals["task"] != _TASK:
        return None
    with suppress(InvalidOption):
        return LLMOptConfig.parse(frame.f_locals["kwargs"].get("llmopt"))
    return None


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def generate(self: Any, *args: Any, llmopt: Any = None, **kwargs: Any) -> Any:
        outer = ACTIVE.get()
        if outer is not None and outer.model is self and outer.submitted and llmopt is None:
            return original(self, *args, **kwargs)
        handle = vars(self).get("llmopt")
        config = LLMOptConfig.parse(llmopt) if llmopt is not None else (handle.config if handle else None)
        if config is None:
            with _active(None):
                return original(self, *args, **kwargs)
        _require_stock_loop(self)
        asked = config.quantization if llmopt is not None else None
        if asked is not None and not quantization.has(self, asked):
            raise InvalidOption(
                f"{asked!r} changes weights, which generate() leaves as they are. Give it to "
                "from_pretrained(..., llmopt=...) or hf_llmopt.optimize(model, llmopt=...)."
            )
        with _active(Active(self, config, named=llmopt is not None)) as active:
            if kwargs.get("custom_generate") is not None:
                _fall_through(active, "custom_generate= replaces the loop that llmopt= would serve")
            elif kwargs.get("cache_implementation") == "paged":
                _fall_through(active, "cache_implementation='paged' asks for transformers' own continuous batching")
            result = original(self, *args, **kwargs)
            if not active.settled:
                _fall_through(active, "transformers chose a decoding method other than greedy search or sampling")
            return result

    return generate


@contextmanager
def _active(active: Active | None) -> Iterator[Any]:
    token = ACTIVE.set(active)
    try:
        yield active
    finally:
        ACTIVE.reset(token)


def _loop(ours: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap a decoding loop: `ours` gets the call, the original and its arguments, where the call is under `llmopt=`."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
            active = ACTIVE.get()
            if active is None or active.model is not self:
                return original(self, *args, **kwargs)
            return ours(active, partial(original, self), *args, **kwargs)

        return loop

    return wrap


def _serve(active: Active, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the sampling loop returns, from the engine, or from `stock` where that cannot serve."""
    try:
        groups = translate(active, *args, **kwargs)
    except NotServed as reason:
        _fall_through(active, str(reason))
        return stock(*args, **kwargs)
    active.settled = True
    undrafted = groups[0].stats.undrafted
    if active.config.strict and undrafted is not None:
        raise NotServed(f"strict=True, and nothing would be guessed for this call: {undrafted}.")
    if active.submitted:
        raise Prepared(groups)
    (group,) = groups
    try:
        group.run()
    finally:
        handle_of(active.model).stats = group.stats
    return group.output()


def _assisted(active: Active, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What assisted decoding returns: its arguments name who drafts."""
    call = inspect.signature(stock).bind(*args, **kwargs).arguments
    inputs = call.pop("model_kwargs", {})
    section = named_drafter(call, active)
    if section is None:
        return _not_served("assisted decoding with the model's own heads", active, stock, *args, **kwargs)
    active.config = replace(active.config, speculative=section)
    inputs["tokenizer"] = call.get("tokenizer")
    plain = {name: call[name] for name in _SAMPLED if name in call}
    return _serve(active, lambda **_: stock(*args, **kwargs), **plain, **inputs)


# What the sampling loop takes by name; the rest are the model's inputs.
_SAMPLED = (
    "input_ids",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "streamer",
)


def _not_served(what: str, active: Active, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What transformers returns, after a warning."""
    _fall_through(active, f"{what} is not served")
    return stock(*args, **kwargs)


def _fall_through(active: Active, reason: str) -> None:
    """Say once why transformers serves this call, or raise if the caller is strict."""
    if active.settled:
        return
    active.settled = True
    if active.submitted:
        raise NotServed(f"Engine.submit cannot serve this request: {reason}.")
    if active.config.strict:
        raise NotServed(f"strict=True, and transformers would have to serve this call: {reason}.")
    handle_of(active.model).stats = Stats(served_by="transformers", reason=reason)
    warnings.warn(f"llmopt: transformers serves this call: {reason}.", UserWarning, stacklevel=_users_frame())


def _users_frame() -> int:
    """How far up the caller is who is neither torch, transformers nor this package; for `stacklevel`."""
    level, frame = 1, inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in (
            "torch",
            "transformers",
            "hf_llmopt",
            "contextlib",
        ):
            return level - 1
        level, frame = level + 1, frame.f_back
    return 1


class _TextGenerationPipeline(TextGenerationPipeline):
    """`pipeline("text-generation", ...)`: the stock class, with an optimized model if `llmopt=` is given.

    With continuous batching it is a `BatchingPipeline`.
    """

    def __new__(cls, *args: Any, llmopt: Any = None, **kwargs: Any) -> Any:
        config = LLMOptConfig.parse(llmopt)
        if config is not None and config.batching.continuous:
            pipeline: TextGenerationPipeline = BatchingPipeline(*args, llmopt=config, **kwargs)
        else:
            pipeline = TextGenerationPipeline(*args, **kwargs)
        if config is not None:
            optimize(pipeline.model, config)
        return pipeline
