"""`hf-llmopt serve --replicas N`: several engines behind one address."""

from __future__ import annotations

import os
from typing import Any

from . import ui
from .command import UserError
from .service import bound


def serve_replicas(host: str, port: int, **arguments: Any) -> None:
    """Serve until a signal comes.

    Args:
        host: Address to listen on.
        port: 0 takes any that is free.
        arguments: Of `serving.ray_app.Arguments`.

    Raises:
        UserError: Ray is not installed, or the port is in use.
    """
    try:
        from hf_llmopt.serving import ray_app
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed: pip install "hf-llmopt[serve,ray]"') from error
    if "RAY_ADDRESS" not in os.environ:  # else Serve may run there, and has its own port
        bound(host, port).close()
    asked = ray_app.Arguments(**arguments)
    name, count = asked.served_name or asked.model, asked.replicas
    ray_app.run(asked, host, port, lambda url: ui.talk(f"serving {name} on {url}/v1, {count} replicas"))
