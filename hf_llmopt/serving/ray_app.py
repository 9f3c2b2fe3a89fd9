"""Several replicas of a server, on one machine or many: an application for Ray Serve. Needs the extra `ray`.

```
clients ─▶ Ray's proxy ─▶ Front ─▶ PrefixRouter ─▶ Replica: engine and the single server's application
                                              └──▶ Replica ...
```
"""

# No `from __future__ import annotations`: Ray reads the annotation of `build`.

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from pydantic import Field
from ray import serve
from ray.serve.config import RequestRouterConfig

from ..errors import InvalidOption
from .auth import Keys
from .hosts import known_hosts
from .limits import Limits
from .ray_front import Front
from .ray_replica import Replica
from .recipe import Recipe

NAME = "hf_llmopt"
ROUTER = "hf_llmopt.serving.ray_router.PrefixRouter"
FRONT_REQUESTS = 10_000  # that are open at one time


class Arguments(Recipe):
    """What `serve run hf_llmopt.serving.ray_app:build NAME=VALUE ...` takes, besides what a `Recipe` does.

    Args:
        replicas: How many there are, or are at least.
        max_replicas: How many there may be; more than `replicas` scales them by how many requests are open.
        target_requests: Open requests of a replica at which another one is started.
        max_ongoing: Most open requests of a replica; others wait in front of it, `max_waiting` at most.
        cpus: Cores of each replica; Ray lets its threads be as many.
        gpus: GPUs of each replica; by default one for each of its ranks where this machine has any.
        drain: Seconds that running requests have when a replica is stopped.
        api_key_file: Keys that are let in, one a line; HF_LLMOPT_API_KEYS adds others.
    """

    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_requests: float = Field(32.0, gt=0)
    max_ongoing: int = Field(256, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float | None = Field(None, ge=0)
    drain: float = Field(30.0, ge=0)
    api_key_file: Path | None = None


def build(arguments: Arguments) -> serve.Application:
    """The application, for `serve.run` or `serve run`.

    Args:
        arguments: Which model, and how many replicas.

    Raises:
        InvalidOption: At most fewer replicas than at least.

    Example:
        >>> from hf_llmopt.serving.ray_app import Arguments, build
        >>> type(build(Arguments(replicas=2))).__name__
        'Application'
    """
    recipe = arguments
    if not len(arguments.keys):  # they are read here: replicas on other machines get digests
        recipe = arguments.model_copy(update={"keys": Keys.read(arguments.api_key_file)})
    gpus = (
        arguments.gpus if arguments.gpus is not None else float(arguments.tensor_parallel * torch.cuda.is_available())
    )
    most = arguments.max_replicas or arguments.replicas
    if most < arguments.replicas:
        raise InvalidOption(f"max_replicas={most} is less than replicas={arguments.replicas}.")
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if most > arguments.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": arguments.replicas,
                "max_replicas": most,
                "target_ongoing_requests": arguments.target_requests,
            }
        }
    replica = serve.deployment(Replica).options(
        name="Replica",
        max_ongoing_requests=arguments.max_ongoing,
        max_queued_requests=arguments.max_waiting,
        graceful_shutdown_timeout_s=arguments.drain,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **scaling,
    )
    front = serve.deployment(Front).options(
        name="Front",
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_timeout_s=arguments.drain,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(
        replica.bind(recipe), Limits(recipe.max_model_len or 0, recipe.max_body_bytes), known_hosts(recipe.hosts)
    )


def start(arguments: Arguments, host: str, port: int) -> str:
    """Start the application and return its address.

    Ray is joined where it runs (`RAY_ADDRESS`, or `ray.init()` before), and else started on this machine.

    Args:
        arguments: As for `build`.
        host: Address to listen on. Where Serve runs already, its own stays.
        port: 0 takes any that is free.
    """
    _join()
    if not port:
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
    serve.start(http_options={"host": host, "port": port})
    serve.run(build(arguments), name=NAME, route_prefix="/")
    return f"http://{host}:{port}"


def stop() -> None:
    """End the application, once what runs has ended."""
    serve.delete(NAME)


def run(arguments: Arguments, host: str, port: int, tell: Callable[[str], object]) -> None:
    """Serve until SIGTERM or Ctrl-C; then running requests have `drain` seconds to end.

    Args:
        arguments: As for `build`.
        host: Address to listen on.
        port: 0 takes any that is free.
        tell: Called with the address, once requests are answered there.
    """
    started = _join()
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own
        signal.signal(number, lambda *_: over.set())
    tell(start(arguments, host, port))
    over.wait()
    stop()
    if started:
        serve.shutdown()
        ray.shutdown()


def _join() -> bool:
    """Join Ray; whether it was started for that."""
    if ray.is_initialized():
        return False
    if "RAY_ADDRESS" in os.environ:
        ray.init()
        return False
    ray.init("local", include_dashboard=False)
    return True
