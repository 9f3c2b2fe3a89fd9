"""A replica: one engine behind the same application that a single server runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from . import garbage, logs
from .app import create_app
from .ray_request import Asked, Start
from .recipe import Recipe


class Replica:
    """What each of Ray Serve's replicas runs.

    Args:
        recipe: How its service is made.
    """

    def __init__(self, recipe: Recipe) -> None:
        logs.to_stderr()
        self.service = recipe.service(_end)
        logs.LOGGER.info("serving", extra={"fields": self.service.summary})
        garbage.freeze()
        self._app = create_app(self.service, recipe.origins)
        self._running: set[asyncio.Task[None]] = set()

    def __del__(self) -> None:
        """Ray drops a replica once it has nothing to do; what still runs then ends with an error."""
        if "service" in vars(self):  # else its model could not be loaded
            self.service.close()

    async def answer(self, asked: Asked) -> AsyncIterator[Start | bytes]:
        """Run the application for one request.

        Yields:
            A `Start`, then further parts of the body: all that has come since the last one.
        """
        messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
        body, gone = [asked.body], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.put_nowait(message)

        run = asyncio.ensure_future(self._app(_scope(asked), receive, send))
        self._running.add(run)  # which ends by itself, also where nobody reads on
        run.add_done_callback(self._running.discard)
        run.add_done_callback(lambda _: messages.put_nowait(None))
        begun: MutableMapping[str, Any] | None = None
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    begun = message
                    continue
                part, ended = message.get("body", b""), False
                while not messages.empty() and not ended:
                    more = messages.get_nowait()
                    ended = more is None
                    part += b"" if more is None else more.get("body", b"")
                if begun is not None:
                    yield Start(begun["status"], tuple(map(tuple, begun["headers"])), part)
                    begun = None
                elif part:
                    yield part
                if ended:
                    return
        finally:
            gone.set()  # the client left, or nothing is left to be read

    def process(self) -> int:
        """Its process id."""
        return os.getpid()


def _end(message: str) -> None:
    """Without one of its ranks a replica is of no use: Ray starts another one, and requests go elsewhere."""
    logs.LOGGER.error("a rank was lost", extra={"fields": {"error": message}})
    os._exit(1)


def _scope(asked: Asked) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "root_path": "",
        "query_string": asked.query,
        "headers": list(asked.headers),
        "client": None,
        "server": None,
    }
