"""What a request may cost, looked at before it costs it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from fastapi import Request

from .errors import APIError

MOST_PARTS = 50_000  # lists and objects of a body: a million small ones would hold up everybody for a second
# A string of JSON; one that does not end goes on to the end of the body, so that nothing is looked at twice.
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Args:
        max_model_len: Most tokens of a prompt and its answer together.
        max_body_bytes: Most bytes of a request's body.
        body_seconds: Most seconds in which a body must have come.
        deadline: Most seconds until an answer is whole, `None` for no limit. A request may ask for less.
    """

    max_model_len: int
    max_body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0
    deadline: float | None = None


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body.

    Raises:
        APIError: It is not said to be JSON (415), too large (413) or too slow (408).
        ClientGone: It will never be whole.
    """
    # Web pages can make a browser send any other type to any address, this machine's own among them.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(415, "Send JSON, with `Content-Type: application/json`.", "unsupported_media_type")
    too_large = APIError(413, f"The body may have {limits.max_body_bytes} bytes at most.", "body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.max_body_bytes:
        raise too_large
    parts: list[bytes] = []

    async def receive() -> None:
        size, more = 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > limits.max_body_bytes:
                raise too_large

    try:
        await asyncio.wait_for(receive(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise APIError(408, f"The body did not come within {limits.body_seconds} s.", "body_too_slow") from None
    return b"".join(parts)


def check_parts(body: bytes) -> None:
    """Refuse a body of very many lists and objects, before all of them are made.

    Raises:
        APIError: It has too many.
    """
    if _parts(body) > MOST_PARTS and (found := _parts(STRING.sub(b"", body))) > MOST_PARTS:
        raise APIError(400, f"The body has {found} lists and objects; at most {MOST_PARTS} are read.", "invalid_value")


def _parts(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def answer_length(limits: Limits, prompt: int, wanted: int | None) -> int:
    """Most tokens of an answer.

    Args:
        limits: Of the server.
        prompt: Tokens of the prompt.
        wanted: Tokens that were asked for, `None` for as many as there is room for.

    Raises:
        APIError: Prompt and answer do not fit.
    """
    room = limits.max_model_len - prompt
    if room < max(1, wanted or 1):
        raise APIError(
            400,
            f"This model's maximum context length is {limits.max_model_len} tokens, and the prompt has {prompt}"
            + (f", the answer {wanted}" if wanted else "")
            + ". Shorten the prompt, or ask for fewer tokens.",
            "context_length_exceeded",
            "messages" if wanted is None else "max_tokens",
        )
    return room if wanted is None else wanted
