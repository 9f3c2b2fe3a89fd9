"""The closed list of what falls through to stock transformers, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..engine import PAGED_LAYERS
from ..errors import UnsupportedModel
from ..kv_cache import STATE_LAYERS, PagedCache
from ..walk import modules
from .prefill import MEDIA_INPUTS, has_content, media, reads_media

# What `generate` hands to the decoding loop for a text prompt. Anything else that has content is not
# a plain text's.
TEXT_INPUTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "inputs_embeds",
    "cache_position",
    "tokenizer",
    "assistant_tokenizer",
}


def require_model(model: Any, what: str) -> None:
    """Refuse what is not a model of transformers.

    Args:
        model: What was given.
        what: Who wants it and for what, the beginning of a sentence.

    Raises:
        UnsupportedModel: It is something else; a wrapper of PEFT's, say.
    """
    if not isinstance(model, PreTrainedModel):
        wraps = hasattr(model, "get_base_model")
        hint = " Give it what that wraps: model.get_base_model()." if wraps else ""
        raise UnsupportedModel(f"{what} a transformers PreTrainedModel, got {type(model).__name__}.{hint}")


def reason_against(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    device: torch.device,
    kwargs: dict[str, Any],
) -> str | None:
    """Why a call of the sampling loop cannot be served, or `None` if it can.

    Args:
        model: The model.
        generation_config: As `generate` prepared it.
        synced_gpus: As given to the loop.
        device: Where the inputs are.
        kwargs: The model's keyword arguments, as `generate` prepared them.
    """
    if kwargs.get("use_cache") is False:
        return "use_cache=False: there is no cache to optimize"
    if generation_config.output_attentions:
        return "output_attentions=True needs attention weights that paged attention never forms"
    if generation_config.output_hidden_states:
        return "output_hidden_states=True is not collected by the engine"
    if generation_config.cache_implementation is not None:
        return (
            f"cache_implementation={generation_config.cache_implementation!r} asks for one of transformers' own caches"
        )
    if generation_config.is_assistant:
        return "the model is the assistant of another model"
    if synced_gpus or is_fsdp_managed_module(model):
        return "synced_gpus, FSDP and DeepSpeed need every process to step together"
    if model.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_autocast_enabled(device.type):
        return "torch.autocast is on: keys would be stored in another dtype than the model's"
    known = TEXT_INPUTS | MEDIA_INPUTS if reads_media(model) else TEXT_INPUTS
    unknown = sorted(name for name, value in kwargs.items() if name not in known and has_content(value))
    if unknown:
        return f"the model input {unknown[0]!r} is not one of a plain text prompt"
    if media(model, kwargs) and getattr(kwargs.get("past_key_values"), "_is_user_defined", False):
        return "images come with past_key_values: prompts with images are computed whole"
    if any("adapter_names" in getattr(hook, "keywords", ()) for m in modules(model) for hook in _before(m)):
        return "adapter_names= gives each row an adapter of its own; Engine.submit(adapter=...) does"
    return _cache_reason(kwargs.get("past_key_values")) or _override_reason(model)


def _before(module: torch.nn.Module) -> Iterable[Any]:
    return module._forward_pre_hooks.values()


def _cache_reason(cache: Cache | None) -> str | None:
    if cache is None or isinstance(cache, PagedCache):
        return None
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"past_key_values is a {type(cache).__name__}, not a DynamicCache or PagedCache"
    for layer in cache.layers:
        if type(layer) not in (*PAGED_LAYERS, *STATE_LAYERS):
            return f"past_key_values has a {type(layer).__name__}"
    return None


def _override_reason(model: PreTrainedModel) -> str | None:
    if "prepare_inputs_for_generation" in vars(model) or ("forward" in vars(model) and not hasattr(model, "_hf_hook")):
        return "the model instance's forward or prepare_inputs_for_generation was replaced (by PEFT prompt learning?)"
    name = "_update_model_kwargs_for_generation"
    if getattr(type(model), name, None) is not getattr(GenerationMixin, name):
        return f"{type(model).__name__} updates its inputs between steps in its own way"
    return None


def rope_limit(model: PreTrainedModel) -> int | None:
    """Tokens beyond which the rotary embedding depends on the longest sequence in the batch; `None` if it never does.

    "dynamic" and "longrope" scaling choose their frequencies from the largest position of the forward pass.
    """
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = [
        values.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for values in nested
        if values.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
