"""How a service is made from names, in this process or another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..batching import Engine
from ..config import LLMOptConfig
from ..errors import InvalidOption
from .auth import Keys
from .limits import Limits
from .service import Service


@dataclass(frozen=True)
class Recipe:
    """What is served, and to whom.

    Args:
        model: A folder, a name on the hub, or `demo`.
        llmopt: Any form of the keyword but `False`.
        dtype: Of the weights.
        device: Where to; a GPU by default if there is one.
        served_name: What clients call the model; by default `model`.
        max_model_len: Most tokens of prompt and answer; by default the model's positions.
        max_waiting: Requests that may wait for pages.
        max_body_bytes: Most bytes of a request's body.
        deadline: Seconds after which an answer ends with an error.
        keys: Who is let in.
        log_prompts: Whether prompts stand in the log.

    Example:
        >>> from hf_llmopt.serving.recipe import Recipe
        >>> service = Recipe(max_model_len=128).service()
        >>> service.name, service.limits.max_model_len
        ('demo', 128)
        >>> service.close()
    """

    model: str = "demo"
    llmopt: Any = True
    dtype: str = "auto"
    device: str | None = None
    served_name: str | None = None
    max_model_len: int | None = None
    max_waiting: int = 1024
    max_body_bytes: int = Limits.max_body_bytes
    deadline: float | None = None
    keys: Keys = field(default_factory=Keys)
    log_prompts: bool = False

    def service(self) -> Service:
        """Load the model and make its service.

        Raises:
            UserError: There is no such model, or it cannot be loaded.
            InvalidOption: The keyword names something that does not exist, or the model does not say how many positions
                it has.
        """
        from ..cli.models import load

        config = LLMOptConfig.parse(self.llmopt)
        if config is None:
            raise InvalidOption("llmopt=False is stock transformers, which `transformers serve` serves.")
        config = replace(config, batching=replace(config.batching, max_waiting=self.max_waiting))
        model, tokenizer = load(self.model, self.dtype, self.device, self.llmopt)
        length = self.max_model_len or getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if length is None:
            raise InvalidOption("The model does not say how many positions it has; give max_model_len.")
        limits = Limits(length, self.max_body_bytes, deadline=self.deadline)
        name = self.served_name or self.model
        return Service(Engine(model, config), tokenizer, name, limits, self.keys, self.log_prompts)
