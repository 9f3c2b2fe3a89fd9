"""Connections that send no request, or read no answer: uvicorn lets them stay for ever, with what they hold."""

from __future__ import annotations

import resource
from collections.abc import Collection
from time import monotonic
from typing import Any

HEAD_SECONDS = 10.0
UNREAD_SECONDS = 60.0
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


class Unread:
    """Closes connections whose client reads nothing of an answer: what was computed for it stays in memory.

    Args:
        seconds: After which one is closed that has read nothing; an answer that has a deadline is held no longer than
            that, counted from when its client has stopped to read.
    """

    def __init__(self, seconds: float = UNREAD_SECONDS) -> None:
        self._seconds = seconds
        self._held: dict[Any, tuple[int, float]] = {}  # bytes that wait, and since when it is so many

    def close_late(self, connections: Collection[Any]) -> None:
        """Look through uvicorn's connections; to be called often.

        Args:
            connections: Protocols of uvicorn, open ones.
        """
        now = monotonic()
        held: dict[Any, tuple[int, float]] = {}
        for connection in connections:
            if connection.cycle is None or not connection.flow.write_paused:
                continue
            size = connection.transport.get_write_buffer_size()  # it only shrinks, by what the client reads
            before, since = self._held.get(connection, (size, now))
            held[connection] = (size, since if size == before else now)
            deadline = connection.cycle.scope.get("state", {}).get("deadline")
            if now - held[connection][1] > min(self._seconds, self._seconds if deadline is None else deadline):
                connection.transport.abort()
        self._held = held
