"""`hf-llmopt serve --replicas N`: several engines behind one address."""

from __future__ import annotations

from typing import Any

from . import ui
from .command import UserError


def serve_replicas(host: str, port: int, **arguments: Any) -> None:
    """Serve until a signal comes.

    Args:
        host: Address to listen on.
        port: 0 takes any that is free.
        arguments: Of `serving.ray_app.Arguments`.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        from hf_llmopt.serving import ray_app
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed: pip install "hf-llmopt[serve,ray]"') from error
    asked = ray_app.Arguments(**arguments)
    name, count = asked.served_name or asked.model, asked.replicas
    ray_app.run(asked, host, port, lambda url: ui.talk(f"serving {name} on {url}/v1, {count} replicas"))
