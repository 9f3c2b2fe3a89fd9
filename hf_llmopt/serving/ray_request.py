"""A request on its way to a replica, and what its prompt begins with."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

ROUTERS: weakref.WeakSet[Any] = weakref.WeakSet()  # that choose replicas in this process
TEXTS = ("cache_salt", "tools", "messages", "prompt")  # in the order in which they shape a prompt's beginning


@dataclass(frozen=True)
class Asked:
    """An HTTP request, whole.

    Attributes:
        method: `GET`, `POST`, ...
        path: What is asked for.
        query: Behind the question mark.
        headers: Pairs of name and value.
        body: All of it.
        replica: The replica that has to answer; empty for any.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = b""
    replica: str = ""

    def to(self, replica: str) -> Asked:
        """The same for one replica."""
        return replace(self, replica=replica)

    def beginnings(self, chunk: int) -> list[bytes]:
        """Names of what the prompt begins with: of its first `chunk` characters, twice as many, and so on.

        Two requests share a name where their prompts, salts and tools begin alike.

        Example:
            >>> def asked(prompt):
            ...     return Asked("POST", "/v1/completions", b"", (), json.dumps({"prompt": prompt}).encode())
            >>> first, second = asked("import os, sys").beginnings(4), asked("import os, re, io").beginnings(4)
            >>> [one == other for one, other in zip(first, second)]
            [True, True, True, False]
        """
        text = _prompt(self.body) if self.method == "POST" else ""
        names, digest = [], blake2b(digest_size=16)
        for end in range(chunk, len(text) + 1, chunk):
            digest.update(text[end - chunk : end].encode("utf-8", "surrogatepass"))
            names.append(digest.copy().digest())
        return names


def _prompt(body: bytes) -> str:
    try:
        asked: Any = json.loads(body)
    except ValueError:  # the replica will say what is wrong with it
        return ""
    if not isinstance(asked, dict):
        return ""
    return "".join(json.dumps(asked[name]) for name in TEXTS if asked.get(name))


@dataclass(frozen=True)
class Start:
    """The beginning of an answer.

    Attributes:
        status: Of HTTP.
        headers: Pairs of name and value.
        body: Its first part.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def streams(self) -> bool:
        """Whether it is a stream of events."""
        return any(name == b"content-type" and b"event-stream" in value for name, value in self.headers)
