"""How a service is made from names, in this process or another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .auth import Keys
from .limits import Limits
from .service import Service


class Recipe(BaseModel):
    """What is served, and to whom.

    Args:
        model: A folder, a name on the hub, or `demo`.
        llmopt: Any form of the keyword but `False`. Prompts are cached unless it is `"kv_cache"`, a dict that says
            otherwise, or an `LLMOptConfig` without.
        dtype: Of the weights.
        device: Where to; a GPU by default if there is one.
        served_name: What clients call the model; by default `model`.
        max_model_len: Most tokens of prompt and answer; by default the model's positions.
        max_waiting: Requests that may wait.
        max_body_bytes: Most bytes of a request's body.
        deadline: Seconds after which an answer ends with an error.
        keys: Who is let in.
        log_prompts: Whether prompts stand in the log.
        tool_parser: How the model writes calls of tools, as of `Service`.
        origins: Whose web pages may read answers, as of `create_app`.
        hosts: Names that the server goes by, as of `create_app`.
        tensor_parallel: Processes that the model is sharded over, the one that makes the service included.

    Example:
        >>> from hf_llmopt.serving.recipe import Recipe
        >>> service = Recipe(max_model_len=128).service()
        >>> service.name, service.limits.max_model_len
        ('demo', 128)
        >>> service.close()
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    model: str = "demo"
    llmopt: Any = True
    dtype: str = "auto"
    device: str | None = None
    served_name: str | None = None
    max_model_len: int | None = Field(default=None, ge=2)
    max_waiting: int = Field(default=1024, ge=1)
    max_body_bytes: int = Field(default=Limits.max_body_bytes, ge=1)
    deadline: float | None = Field(default=None, gt=0)
    keys: Keys = Field(default_factory=Keys)
    log_prompts: bool = False
    tool_parser: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    tensor_parallel: int = Field(default=1, ge=1)

    @property
    def setting(self) -> str:
        """Fingerprint of what answers depend on: the same for options that change speed and memory only.

        Raises:
            InvalidOption: The keyword names something that does not exist.
        """
        from ..cli.service import config_of

        config, folder = config_of(self.llmopt), Path(self.model).expanduser()
        pages = config.kv_cache
        answers = [
            str(folder.resolve()) if folder.is_dir() else self.model,
            self.served_name or self.model,
            self.dtype,
            self.max_model_len,
            self.tool_parser,
            repr(config.quantization and astuple(config.quantization)),
            *(pages.dtype, pages.eviction, pages.keep_tokens, pages.keep_ratio),
        ]
        return hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]

    def service(self, on_loss: Callable[[str], object] | None = None) -> Service:
        """Load the model and make its service.

        Args:
            on_loss: Called with a message when a process of a sharded model has ended by itself.

        Raises:
            UserError: There is no such model, or it cannot be served.
            InvalidOption: The keyword names something that does not exist.
        """
        from ..cli.service import make

        return make(
            self.model,
            self.llmopt,
            self.dtype,
            self.device,
            self.served_name,
            self.max_model_len,
            self.max_waiting,
            self.max_body_bytes,
            self.deadline,
            self.tensor_parallel,
            on_loss,
            keys=self.keys,
            log_prompts=self.log_prompts,
            tool_parser=self.tool_parser,
        )
