"""Prompts that the model's own forward pass computes.

Those with images, whose tokens are more than their ids, and all prompts of models with recurrent states, which cannot
stand beside one another in a row of tokens. The prompt runs once, whole and padded, exactly as transformers would run
it. Its keys and values are copied into pages, and from the first new token on a request is like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..engine import EngineLoop, Request, take_in
from ..errors import InvalidRequest
from .group import Group

# Inputs beside a prompt's ids that models of images, videos and sound read in its pass, and in no later one.
MEDIA_INPUTS = {
    "mm_encoder_outputs",
    "pixel_values",
    "pixel_values_images",
    "pixel_values_local",
    "pixel_values_videos",
    "high_res_pixel_values",
    "pixel_mask",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_grids",
    "image_patches",
    "image_patches_indices",
    "image_position_ids",
    "image_sizes",
    "image_sizes_videos",
    "image_token_pooling",
    "num_local_patches",
    "patches_grid",
    "spatial_shapes",
    "target_sizes",
    "video_grid_thw",
    "video_grids",
    "video_token_pooling",
    "second_per_grid_ts",
    "input_features",
    "input_features_mask",
    "input_values",
    "input_values_mask",
    "token_type_ids",
    "mm_token_type_ids",
}


def reads_media(model: PreTrainedModel) -> bool:
    """Whether the model reads anything but text."""
    kinds = getattr(model, "input_modalities", None) or "text"  # a name, or several
    return ({kinds} if isinstance(kinds, str) else set(kinds)) != {"text"}


def media(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call's prompts hold beside text, by the names of `MEDIA_INPUTS`; nothing for a prompt of text.

    Args:
        model: The model.
        kwargs: Its keyword arguments, as `generate` prepared them.
    """
    if not reads_media(model):
        return {}
    found = {name: kwargs[name] for name in MEDIA_INPUTS if kwargs.get(name) is not None}
    # Token types that are all 0 say that all is text.
    types = [name for name in found if name.endswith("token_type_ids")]
    some = any(has_content(value) for name, value in found.items() if name not in types)
    return found if some or any(bool(found[name].any()) for name in types) else {}


def has_content(value: Any) -> bool:
    """Something was given; of a model that takes images `generate` collects what it made of them in a dict."""
    return value is not None and not (isinstance(value, dict) and not value)


def compute_whole(group: Group, mask: Tensor, generation_config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Let the model's own pass compute the prompts of a group's rows, when they start.

    Args:
        group: The rows.
        mask: Which columns of their prompts are tokens, bool `[rows, length]` on the CPU.
        generation_config: As `generate` prepared it.
        kwargs: The model's keyword arguments, as `generate` prepared them.
    """
    engine, requests, input_ids = group.engine, group.requests, group.input_ids

    def on_start() -> None:
        group.stats.forward_seconds += _compute(engine, requests, input_ids, mask, generation_config, kwargs)
        group.stats.steps += 1

    group.on_start = on_start
    for request in requests:
        request.brought = len(request.tokens)
    speculative = engine.config.speculative
    if engine.speculator is not None and speculative is not None and speculative.effective_method != "suffix":
        for request in requests:
            request.most_drafts = None
        group.stats.undrafted = "who guesses would have to see the prompt's images; method='suffix' needs its ids only"


def _compute(
    engine: EngineLoop,
    requests: Sequence[Request],
    input_ids: Tensor,
    mask: Tensor,
    generation_config: GenerationConfig,
    kwargs: dict[str, Any],
) -> float:
    """Compute prompts: keys to pages, logits to requests. With the engine's lock held; returns seconds."""
    if any(request.adapter is not None or request.on_prompt is not None for request in requests):
        raise InvalidRequest(
            "The model's own forward pass computes this prompt whole, since it holds images or the model keeps "
            "recurrent states: adapter= and prompt_logprobs= are not known there. Leave them out."
        )
    model: Any = engine.runner.model
    cache = DynamicCache(config=model.config)
    began = perf_counter()
    with torch.no_grad():
        output = model._prefill(input_ids, generation_config, {**kwargs, "past_key_values": cache, "use_cache": True})
    take_in(engine.store, requests, cache, mask, output.logits[:, -1], engine.runner.states)
    for request in requests:
        if request.group is not None:
            request.group.notice()
    return perf_counter() - began
