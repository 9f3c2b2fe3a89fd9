"""A server in this process, for tests that talk to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from hf_llmopt import BatchingConfig, Engine, LLMOptConfig

pytest.importorskip("fastapi")

from hf_llmopt.serving import Keys, Limits, Server, Service


class Running:
    """A server in a thread of this process, and the log that it writes."""

    def __init__(self, service: Service, drain: float = 20.0, origins: Sequence[str] = (), **more) -> None:
        self.service = service
        self.server = Server(service, drain, origins, **more)
        listening = self.server.listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()

    def held(self) -> int:
        """Pages that requests hold."""
        return sum(pool.used for pool in self.service.engine.loop.scheduler.pools)

    def idle(self) -> bool:
        """Wait until no request holds a page, or ten seconds."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            if not (self.held() or self.service.engine.waiting or self.service.open):
                return True
            time.sleep(0.01)
        return False


@contextmanager
def running(service: Service, drain: float = 20.0, origins: Sequence[str] = (), **more) -> Iterator[Running]:
    it = Running(service, drain, origins, **more)
    try:
        yield it
    finally:
        it.server.stop()
        it.thread.join(30)
        assert not it.thread.is_alive()


def make(
    pair, keys: Keys | None = None, limits: Limits | None = None, cache_bytes: int | None = None, **batching
) -> Service:
    """A service on a model and its tokenizer."""
    model, tokenizer = pair
    config = LLMOptConfig(prompt_cache={"max_bytes": cache_bytes}, batching=BatchingConfig(**batching))
    return Service(Engine(model, config), tokenizer, "demo", limits, keys)
