"""The process: it stops without losing an answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from time import monotonic
from types import FrameType

import uvicorn

from .app import create_app
from .connections import HEAD_SECONDS, UNREAD_SECONDS, Unread, Waiting, most_connections
from .service import Service

LAST_SECONDS = 5  # for errors to be sent once the engine was closed
BACKLOG = 512  # connections that wait to be accepted


class Server(uvicorn.Server):
    """Serves until it is told to stop, then lets what runs end.

    At the first signal new requests get 503, and `/health` says so; those that run go on. When the last one has ended,
    or after `drain` seconds, or at the second signal, it stops; what still ran then ends with 503. It stops at once
    where a process of a sharded model has ended.

    Args:
        service: What is served.
        drain: Seconds that running requests have to end.
        origins: Whose web pages may read answers, as of `create_app`.
        hosts: Names that it goes by, as of `create_app`.
        head_seconds: In which a request's headers must have come.
        unread_seconds: After which a connection is closed whose client reads nothing of its answer.
    """

    def __init__(
        self,
        service: Service,
        drain: float = 30.0,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
        head_seconds: float = HEAD_SECONDS,
        unread_seconds: float = UNREAD_SECONDS,
    ) -> None:
        most = most_connections()
        super().__init__(
            uvicorn.Config(
                create_app(service, origins, hosts),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_SECONDS,
                backlog=BACKLOG,
            )
        )
        self._service = service
        service.crowded = lambda: len(self.server_state.connections) > most
        self._drain = drain
        self._until: float | None = None
        self._unread = Unread(unread_seconds)
        self._waiting = Waiting(most * 3 // 4, head_seconds)  # so that others still find room

    @staticmethod
    def bind(host: str, port: int) -> socket.socket:
        """A socket that has its address, and refuses connections until its `listen()`; port 0 takes any that is free.

        Raises:
            OSError: The address is in use, or not of this machine.
        """
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a server that has just ended
            if bound.family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # "::" lets in what it says
            bound.bind((host, port))
        except OSError:
            bound.close()
            raise
        return bound

    @classmethod
    def listen(cls, host: str, port: int) -> socket.socket:
        """A socket to serve on, for `run(sockets=[...])`; port 0 takes any that is free.

        Raises:
            OSError: The address is in use, or not of this machine.
        """
        listening = cls.bind(host, port)
        listening.listen(BACKLOG)
        return listening

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._until is None:
            self.stop()
        else:
            super().handle_exit(sig, frame)

    def stop(self) -> None:
        """Begin to stop; may be called in any thread."""
        self._service.draining = True
        self._until = monotonic() + self._drain

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to leave; called ten times a second."""
        exits: bool = await super().on_tick(counter)
        self._waiting.close_late(self.server_state.connections)
        self._unread.close_late(self.server_state.connections)
        exits |= self._service.engine.lost is not None
        if self._until is not None:
            exits |= not self._service.open or monotonic() > self._until
        if exits:
            await asyncio.to_thread(self._service.close)
        return exits
