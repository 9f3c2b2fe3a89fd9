"""What `bench serve` asks for: prompts that begin alike in groups, when they come, and who asks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from threading import Thread
from time import perf_counter, sleep
from typing import Any
from urllib.parse import urlsplit

import numpy as np

TIMEOUT = 600.0  # seconds without a byte after which an answer counts as failed


@dataclass(frozen=True)
class Load:
    """A set of requests. Lengths of prompts are in characters: a server gets text.

    Attributes:
        requests: How many.
        groups: Every prompt begins with one of so many texts, as with a few system prompts.
        shared: Characters of each of those.
        own: Fewest and most characters behind them.
        new: Fewest and most tokens to generate.
    """

    requests: int = 64
    groups: int = 4
    shared: int = 400
    own: tuple[int, int] = (40, 300)
    new: tuple[int, int] = (16, 64)


QUICK = Load(requests=4, groups=2, shared=40, own=(8, 20), new=(2, 6))


@dataclass(frozen=True)
class Ask:
    """One request: its prompt, and how many tokens to generate at most."""

    prompt: str
    new: int


@dataclass
class Reply:
    """What came back.

    Attributes:
        text: The answer.
        tokens: How many tokens it has, as the server counts them.
        times: Of `perf_counter`, when each piece of text came; of an answer that is not streamed, when all of it did.
        error: Why there is no answer.
    """

    text: str = ""
    tokens: int = 0
    times: list[float] = field(default_factory=list)
    error: str | None = None


def draw(load: Load, texts: Sequence[str], seed: Sequence[int]) -> list[Ask]:
    """Draw the requests of a load.

    Args:
        load: How many, and how long.
        texts: Prompts are cut from them.
        seed: Chooses lengths and places.

    Example:
        >>> draw(Load(2, groups=1, shared=3, own=(2, 4), new=(1, 5)), ["abcdefghij" * 9], seed=[0])
        [Ask(prompt='efgefg', new=2), Ask(prompt='efgde', new=1)]
    """
    rng = np.random.default_rng(list(seed))
    text = "".join(texts)

    def cut(length: int) -> str:
        start = int(rng.integers(len(text) - length + 1))
        return text[start : start + length]

    beginnings = [cut(load.shared) for _ in range(load.groups)]
    return [
        Ask(
            beginnings[int(rng.integers(load.groups))] + cut(int(rng.integers(load.own[0], load.own[1] + 1))),
            int(rng.integers(load.new[0], load.new[1] + 1)),
        )
        for _ in range(load.requests)
    ]


def arrivals(rate: float, count: int, seed: Sequence[int]) -> list[float]:
    """Seconds after which requests come, independently of one another (Poisson); all at once at an infinite rate."""
    gaps = np.random.default_rng(list(seed)).exponential(1.0, size=count)
    return [float(at) / rate for at in np.cumsum(gaps)]


class Client:
    """Speaks OpenAI's completions to one server over one connection. Not for several threads.

    Args:
        url: The server's, without a path.
        model: What it calls the model.
        streams: Whether answers come token by token.
    """

    def __init__(self, url: str, model: str, streams: bool = True) -> None:
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
        self._fixed = {"model": model, "temperature": 0, "stream": streams}
        if streams:
            self._fixed["stream_options"] = {"include_usage": True}

    def __call__(self, ask: Ask) -> Reply:
        """Send a request, greedy, and read the answer; a failure is told, not raised."""
        body = json.dumps({**self._fixed, "prompt": ask.prompt, "max_tokens": ask.new})
        reply = Reply()
        try:
            self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            if response.status != 200:
                reply.error = f"{response.status}: {response.read(200).decode(errors='replace')}"
                self._connection.close()
            elif self._fixed["stream"]:
                for line in response:
                    if line.startswith(b"data: {"):
                        _take(reply, json.loads(line[6:]))
            else:
                _take(reply, json.loads(response.read()))
            reply.times = reply.times or [perf_counter()]  # an answer may have no text
        except (OSError, HTTPException, ValueError) as error:
            reply.error = f"{type(error).__name__}: {error}"
            self._connection.close()
        return reply

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *failure: object) -> None:
        self._connection.close()


def _take(reply: Reply, body: dict[str, Any]) -> None:
    """Add what a chunk, or a whole answer, says."""
    if "error" in body:
        reply.error = json.dumps(body["error"])
    for choice in body.get("choices", ()):
        if choice.get("text"):
            reply.times.append(perf_counter())
            reply.text += choice["text"]
    if body.get("usage"):
        reply.tokens = body["usage"]["completion_tokens"]


def open_loop(
    asks: Sequence[Ask], times: Sequence[float], connect: Callable[[], Client]
) -> tuple[float, list[float], list[Reply]]:
    """Send each request when it is due, whatever became of those before it.

    Args:
        asks: The requests.
        times: When each is due, in seconds from the start.
        connect: Makes a client; each request has its own connection.

    Returns:
        Seconds until the last answer was whole, when each request was due, of `perf_counter`, and the replies.
    """
    replies = [Reply() for _ in asks]

    def send(number: int) -> None:
        with connect() as client:
            replies[number] = client(asks[number])

    began, threads = perf_counter(), []
    for number, at in enumerate(times):
        sleep(max(0.0, began + at - perf_counter()))
        threads.append(Thread(target=send, args=(number,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return perf_counter() - began, [began + at for at in times], replies


def closed_loop(
    asks: Sequence[Ask], clients: int, connect: Callable[[], AbstractContextManager[Callable[[Ask], Reply]]]
) -> tuple[float, list[Reply]]:
    """So many clients, each of which sends the next request when it has an answer.

    Args:
        asks: The requests.
        clients: Threads.
        connect: Makes what answers the requests of one client.

    Returns:
        Seconds that all took, and the replies in the order of `asks`.
    """
    replies = [Reply() for _ in asks]
    turn = itertools.count()  # its `next` is atomic

    def work() -> None:
        with connect() as answer:
            while (number := next(turn)) < len(asks):
                replies[number] = answer(asks[number])

    threads = [Thread(target=work, daemon=True) for _ in range(clients)]
    began = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - began, replies
