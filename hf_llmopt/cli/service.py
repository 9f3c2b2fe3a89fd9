"""A model that is served, by the name that a user typed."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .command import UserError
from .models import load

if TYPE_CHECKING:
    from hf_llmopt.serving import Service

MAX_WAITING = 1024
MAX_BODY_BYTES = 8 * 2**20


def room() -> ModuleType:
    """`hf_llmopt.serving`.

    Raises:
        UserError: The extra is not installed.
    """
    try:
        from hf_llmopt import serving
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed: pip install "hf-llmopt[serve]"') from error
    return serving


def make(
    model: str,
    wanted: Any,
    dtype: str,
    device: str | None,
    served_name: str | None = None,
    max_model_len: int | None = None,
    max_waiting: int = MAX_WAITING,
    max_body_bytes: int = MAX_BODY_BYTES,
    deadline: float | None = None,
    **more: Any,
) -> Service:
    """Load a model and make a service of it.

    Args:
        model: `demo`, a folder, or a name on the hub.
        wanted: The keyword.
        dtype: Type of the weights.
        device: Where to.
        served_name: What requests call it; by default `model`.
        max_model_len: Most tokens of prompt and answer; by default the model's positions.
        max_waiting: Requests that may wait.
        max_body_bytes: Most bytes of a request's body.
        deadline: Seconds until an answer has to be whole.
        more: Further arguments of `Service`.

    Raises:
        UserError: The extra is not installed, or the model cannot be served.
    """
    from hf_llmopt import Engine, LLMOptConfig

    serving = room()
    config = LLMOptConfig.parse(wanted)
    assert config is not None
    config = replace(config, batching=replace(config.batching, max_waiting=max_waiting))
    loaded, tokenizer = load(model, dtype, device, wanted)
    length = max_model_len or getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise UserError("the model does not say how many positions it has; give --max-model-len")
    limits = serving.Limits(length, max_body_bytes, deadline=deadline)
    service: Service = serving.Service(Engine(loaded, config), tokenizer, served_name or model, limits, **more)
    return service
