"""From the fields of a request to the arguments of `Engine.submit`."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from .schema import Generation

GREEDY_BELOW = 1e-5  # temperatures that would only overflow


def arguments(ask: Generation, model: GenerationConfig) -> dict[str, Any]:
    """How tokens are to be chosen.

    What a request leaves open is as the model's own generation config says, else as OpenAI's API does it: temperature 1
    over the whole vocabulary.

    Args:
        ask: The request.
        model: The model's generation config.

    Returns:
        Arguments of `Engine.submit`.
    """

    def given(name: str, default: float | None) -> Any:
        value = getattr(ask, name)
        return value if value is not None else (getattr(model, name, None) or default)

    found: dict[str, Any] = {
        "frequency_penalty": ask.frequency_penalty or 0.0,
        "presence_penalty": ask.presence_penalty or 0.0,
        "logit_bias": ask.biases or None,
        "seed": ask.seed,
        "priority": ask.priority or 0,
    }
    repetition = given("repetition_penalty", None)
    if repetition is not None:
        found["repetition_penalty"] = repetition
    if ask.min_tokens:
        found["min_new_tokens"] = ask.min_tokens
    temperature = given("temperature", 1.0)
    if temperature < GREEDY_BELOW:
        return {**found, "do_sample": False}
    return {
        **found,
        "do_sample": True,
        "temperature": float(temperature),
        "top_k": max(0, given("top_k", 0)),  # -1 is another word for no limit
        "top_p": float(given("top_p", 1.0)),
        "min_p": given("min_p", None),
    }


def end_tokens(model: GenerationConfig) -> frozenset[int]:
    """The tokens with which an answer ends."""
    ids = model.eos_token_id
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)
