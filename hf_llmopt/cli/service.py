"""A model that is served, by the name that a user typed."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import ui
from .command import UserError
from .models import check_shards, load, load_shard, tokenizer

if TYPE_CHECKING:
    from hf_llmopt import Engine, LLMOptConfig
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
    tensor_parallel: int = 1,
    on_loss: Callable[[str], object] | None = None,
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
        tensor_parallel: Processes that the model is sharded over, this one included.
        on_loss: Called with a message when one of the others has ended by itself.
        more: Further arguments of `Service`.

    Raises:
        UserError: The extra is not installed, or the model cannot be served.
        InvalidOption: The keyword or another option names something that does not exist or cannot be.
    """
    serving = room()
    config = config_of(wanted)
    config = replace(config, batching=replace(config.batching, max_waiting=max_waiting))
    if tensor_parallel > 1:
        engine, tokens = _sharded(model, config, dtype, device, tensor_parallel, on_loss)
    else:
        engine, tokens = _whole(model, config, dtype, device, wanted)
    length = max_model_len or getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        engine.close()
        raise UserError("the model does not say how many positions it has; give --max-model-len")
    limits = serving.Limits(length, max_body_bytes, deadline=deadline)
    try:
        service: Service = serving.Service(engine, tokens, served_name or model, limits, **more)
    except BaseException:
        engine.close()
        raise
    return service


def end_if_lost(service: Service) -> None:
    """End this process where another one of a sharded model has ended by itself."""
    if service.engine.lost is not None:
        ui.fail(service.engine.lost)
        os._exit(1)  # the engine's thread may wait for the lost rank for ever


def _whole(model: str, config: LLMOptConfig, dtype: str, device: str | None, wanted: Any) -> tuple[Engine, Any]:
    """An engine in this process, and the tokenizer."""
    from hf_llmopt import Engine

    loaded, tokens = load(model, dtype, device, wanted)
    return Engine(loaded, config), tokens


def _sharded(
    model: str,
    config: LLMOptConfig,
    dtype: str,
    device: str | None,
    ranks: int,
    on_loss: Callable[[str], object] | None,
) -> tuple[Engine, Any]:
    """An engine on rank 0 of several processes, and the tokenizer."""
    from hf_llmopt.batching.sharded import ShardedEngine

    if config.quantization is not None:
        raise UserError(
            f"--tensor-parallel {ranks} shards weights as they are stored, and --llmopt asks for "
            f"{config.quantization.method}; leave one of them out"
        )
    check_shards(model, ranks, device)
    tokens = tokenizer(model)  # if that fails, it does so at once
    return ShardedEngine.start(partial(load_shard, model, dtype), ranks, config, on_loss), tokens
