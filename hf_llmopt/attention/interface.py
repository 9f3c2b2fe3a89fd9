"""The attention function that transformers calls by the name `"llmopt"`.

In an engine step it reads pages. In a plain forward it is whatever the model used before, or ordinary dense attention
if a user chose `attn_implementation="llmopt"`.

The step is found by the config of the attention module and the running thread. A keyword of `model(...)` would be
plainer, but some models (StableLM, Nemotron) drop keywords on the way to their attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels import reference

NAME = "llmopt"  # must not contain "flash": transformers drops masks for such names


class Step(Protocol):
    """What a forward pass reads: `StepInputs`, or the probe."""

    def read(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention output `[1, tokens, heads, value_dim]`."""
        ...


class _Serving(NamedTuple):
    """A config that an engine step has set to NAME."""

    former: str
    thread: int  # another thread's plain forward through the same model may run at the same moment
    step: Step


_serving: dict[int, _Serving] = {}  # by id(config)


def register() -> None:
    """Add the name to transformers' registries. New names only; nothing is replaced."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, mask)


@contextmanager
def serving(configs: list[Any], step: Step) -> Iterator[None]:
    """Let the attention of modules with these configs read `step` inside the block.

    The configs are found beforehand, by `configs_of`: walking a model's modules costs more than a step may. Only one
    thread at a time may enter for the same model.
    """
    # A fused layer proves itself inside a step, so blocks nest: the outer one is put back as it was.
    outer = [(config, _serving.get(id(config)), config._attn_implementation_internal) for config in configs]
    for config, before, name in outer:
        _serving[id(config)] = _Serving(before.former if before else name, get_ident(), step)
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, before, name in outer:
            config._attn_implementation_internal = name
            if before:
                _serving[id(config)] = before
            else:
                del _serving[id(config)]


def current_step(config: Any) -> Step | None:
    """The step that this thread runs through modules with this config, if any."""
    serving = _serving.get(id(config))
    return serving.step if serving is not None and serving.thread == get_ident() else None


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config object that a module of the model reads its attention implementation from."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; shapes as transformers has them, `[batch, heads, tokens, width]`."""
    config = getattr(module, "config", None)
    if (step := current_step(config)) is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return step.read(module, query, key, value, scaling, kwargs), None
    serving = _serving.get(id(config))
    if serving is None:
        function = _dense
    elif serving.former == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[serving.former]
    output: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return output


def mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """The registered mask function: none for an engine step, else the former implementation's."""
    serving = _serving.get(id(config))
    if serving is None:
        return sdpa_mask(*args, config=config, **kwargs)
    if serving.thread == get_ident():
        return None
    function = ALL_MASK_ATTENTION_FUNCTIONS[serving.former]
    return function(*args, config=config, **kwargs)


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and s_aux is None:
        causal = attention_mask is None and query.shape[2] > 1
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=True
        )
    else:
        if attention_mask is None:
            index = torch.arange(key.shape[2], device=query.device)
            attention_mask = reference.visible(index[-query.shape[2] :], index, "full", 0)[None, None]
        output = reference.attention(query, key, value, attention_mask, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None
