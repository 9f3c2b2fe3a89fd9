"""A model that is served, by the name that a user typed."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .command import UserError
from .models import load

if TYPE_CHECKING:
    from hf_llmopt import LLMOptConfig
    from hf_llmopt.serving import Keys, Service

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
        raise UserError(
            f'{error.name} is not installed: pip install "hf-llmopt[serve]", or in the checkout '
            "pip install '.[serve]'"
        ) from error
    return serving


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address; nobody can connect yet.

    Raises:
        UserError: It is in use, or not of this machine.
    """
    try:
        taken: socket.socket = room().Server.bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; choose another --port, or 0 for any") from error
        raise UserError(f"cannot listen on port {port} of {host}: {error.strerror}; see --host and --port") from error
    return taken


def keys_of(file: Path | None) -> Keys:
    """Who is let in, by `--api-key-file` and the environment.

    Raises:
        UserError: The file cannot be read.
        InvalidOption: It has no key.
    """
    try:
        keys: Keys = room().Keys.read(file)
    except OSError as error:
        raise UserError(f"--api-key-file {str(file)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--api-key-file {str(file)!r} is no text in UTF-8") from error
    return keys


def config_of(wanted: Any) -> LLMOptConfig:
    """What is served for a value of the keyword: prompts are cached unless it says otherwise.

    Args:
        wanted: Any form of the keyword but `False`. `"kv_cache"`, `"memory"`, a dict that names `prompt_cache`
            and an `LLMOptConfig` are taken as they are.

    Raises:
        InvalidOption: It names something that does not exist, or is `False`.
    """
    from hf_llmopt import LLMOptConfig, PromptCacheConfig
    from hf_llmopt.errors import InvalidOption

    config = LLMOptConfig.parse(wanted)
    if config is None:
        raise InvalidOption("llmopt=False is stock transformers, which `transformers serve` serves.")
    said = wanted in ("kv_cache", ["kv_cache"], "memory", ["memory"]) or (
        isinstance(wanted, Mapping) and "prompt_cache" in wanted
    )
    if said or isinstance(wanted, LLMOptConfig) or config.prompt_cache is not None:
        return config
    return replace(config, prompt_cache=PromptCacheConfig())


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
        InvalidOption: The keyword or another option names something that does not exist or cannot be.
    """
    from hf_llmopt import Engine

    serving = room()
    config = config_of(wanted)
    config = replace(config, batching=replace(config.batching, max_waiting=max_waiting))
    loaded, tokenizer = load(model, dtype, device, wanted)
    length = max_model_len or getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise UserError("the model does not say how many positions it has; give --max-model-len")
    limits = serving.Limits(length, max_body_bytes, deadline=deadline)
    service: Service = serving.Service(Engine(loaded, config), tokenizer, served_name or model, limits, **more)
    return service
