"""Connections that send no request: uvicorn lets them stay for ever, and each takes a file handle."""

from __future__ import annotations

import resource
from collections.abc import Collection
from time import monotonic
from typing import Any

HEAD_SECONDS = 10.0
MOST = 16_384


def most_connections() -> int:
    """Half of the files that this process may open, so that all else still can be."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if files == resource.RLIM_INFINITY else min(MOST, files // 2)


class Waiting:
    """Closes connections whose request's head does not come.

    Args:
        most: Connections that may be open; above that, those that wait longest are closed at once.
        seconds: In which a head must have come, or its connection is closed.
    """

    def __init__(self, most: int, seconds: float = HEAD_SECONDS) -> None:
        self._most = most
        self._seconds = seconds
        self._since: dict[Any, tuple[Any, float]] = {}

    def close_late(self, connections: Collection[Any]) -> None:
        """Look through uvicorn's connections; to be called often.

        Args:
            connections: Protocols of uvicorn, open ones.
        """
        now = monotonic()
        since: dict[Any, tuple[Any, float]] = {}
        for connection in connections:
            last = connection.cycle  # the request before, `None` for the first one
            if last is None or last.response_complete:
                # uvicorn itself closes those that have had an answer and are silent since.
                silent = connection.timeout_keep_alive_task is not None
                before, began = self._since.get(connection, (last, now))
                since[connection] = (last, began if before is last and not silent else now)
        over = len(connections) - self._most
        for index, (connection, (_, began)) in enumerate(sorted(since.items(), key=lambda item: item[1][1])):
            if index < over or now - began > self._seconds:
                connection.transport.abort()
        self._since = since
