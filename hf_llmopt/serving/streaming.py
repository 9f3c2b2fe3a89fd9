"""Answers as server-sent events, or all at once; either way nothing goes on once the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from ..errors import LLMOptError
from .answer import Answer, Piece
from .errors import of_engine
from .limits import ClientGone
from .logs import LOGGER
from .schema import Generation
from .written import MANY, beside, written

DONE = "data: [DONE]\n\n"


class Form(Protocol):
    """How an endpoint writes answers."""

    def opening(self, answer: Answer) -> list[dict[str, Any]]:
        """Chunks of a stream before an answer's first piece."""
        ...

    def chunk(self, answer: Answer, piece: Piece) -> dict[str, Any] | None:
        """A choice of a stream, `None` for one that says nothing."""
        ...

    def choice(self, answer: Answer, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice of an answer in one piece."""
        ...

    def envelope(self, choices: list[dict[str, Any]], streams: bool) -> dict[str, Any]:
        """What choices stand in."""
        ...


def usage(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """Token counts of a request; the `n` answers to a prompt share it."""
    firsts = answers[::n]
    prompt, completion = sum(len(answer.prompt) for answer in firsts), sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.handle.stats.cached_tokens for answer in firsts)},
    }


def note(request: Request, answers: Sequence[Answer], n: int) -> None:
    """Leave for the log what a request was and how it went."""
    counts = usage(answers, n)
    firsts = [answer.first for answer in answers if answer.first is not None]
    request.state.note |= {
        "prompt_tokens": counts["prompt_tokens"],
        "cached_tokens": counts["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": counts["completion_tokens"],
        "choices": len(answers),
        "first_token_seconds": round(min(firsts), 6) if firsts else None,
    }


async def respond(request: Request, answers: Sequence[Answer], n: int, form: Form, ask: Generation) -> Response:
    """What was asked for: a stream of events, or all choices at once; raises what `whole` raises."""
    if ask.stream:
        return EventStream(request, answers, n, form, ask.wants_usage)
    return await whole(request, answers, n, form)


async def whole(request: Request, answers: Sequence[Answer], n: int, form: Form) -> Response:
    """All choices in one JSON object.

    Raises:
        APIError: A request failed.
        ClientGone: The client left; all requests were ended.
    """

    async def pieces(answer: Answer) -> list[Piece]:
        return [piece async for piece in answer.pieces(at_once=not answer.text.stops)]

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(left())
    work = asyncio.gather(*map(pieces, answers))
    try:
        both: list[asyncio.Future[Any]] = [watch, work]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        found = work.result()
    except LLMOptError as error:
        raise of_engine(error) from error
    finally:
        watch.cancel()
        work.cancel()
        for answer in answers:
            answer.give_up()
        note(request, answers, n)
        await asyncio.gather(watch, work, return_exceptions=True)  # whatever else failed has been said

    def body() -> bytes:
        choices = [form.choice(answer, own) for answer, own in zip(answers, found, strict=True)]
        return "".join(written({**form.envelope(choices, False), "usage": usage(answers, n)})).encode()

    tokens = sum(len(answer.prompt) + answer.tokens for answer in answers)
    return Response(await beside(tokens, body), media_type="application/json")


class EventStream(StreamingResponse):
    """Choices as they grow.

    Args:
        request: Of HTTP.
        answers: Its answers.
        n: Answers to each prompt.
        form: How they are written.
        wants_usage: Whether token counts come last.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, answers: Sequence[Answer], n: int, form: Form, wants_usage: bool) -> None:
        self._end: Callable[[], None] = lambda: note(request, answers, n)
        self._answers = answers
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not wait for more
        super().__init__(_events(request, answers, n, form, wants_usage), headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it; called by the framework."""
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where the client left before the first event
            for answer in self._answers:
                answer.give_up()
            self._end()


async def _events(
    request: Request, answers: Sequence[Answer], n: int, form: Form, wants_usage: bool
) -> AsyncIterator[str]:
    def event(choices: list[dict[str, Any]], counts: dict[str, Any] | None = None, large: bool = False) -> str:
        body = form.envelope(choices, True)
        if wants_usage:
            body["usage"] = counts
        return f"data: {''.join(written(body)) if large else json.dumps(body, ensure_ascii=False)}\n\n"

    def told(answer: Answer, piece: Piece, large: bool) -> str | None:
        chunk = form.chunk(answer, piece)
        return None if chunk is None else event([chunk], large=large)

    begun: set[Answer] = set()
    try:
        for answer in answers:
            for choice in form.opening(answer):
                yield event([choice])
        async for answer, piece in _merged(answers):
            if not (piece.text or piece.logprobs or piece.finish):
                continue
            echo = (
                0 if answer in begun else len(answer.prompt)
            )  # with the first piece its prompt may come, with figures
            begun.add(answer)
            tokens = echo + len(piece.logprobs)
            if (chunk := await beside(tokens, partial(told, answer, piece, tokens > MANY))) is not None:
                yield chunk
        if wants_usage:
            yield event([], usage(answers, n))
    except LLMOptError as error:  # the status was sent long ago
        failed = of_engine(error)
        request.state.note["error"] = failed.code
        yield f"data: {json.dumps(failed.body)}\n\n"
    except Exception as error:
        LOGGER.error("a stream failed", exc_info=error)
        request.state.note["error"] = "internal_error"
        body = {"message": "The server failed.", "type": "server_error", "param": None, "code": "internal_error"}
        yield f"data: {json.dumps({'error': body})}\n\n"
    yield DONE


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[Answer, Piece]]:
    """The pieces of all answers, each as soon as it is there.

    Raises:
        LLMOptError: One of them failed; the others are ended.
    """
    # Where nobody reads, tokens wait as tokens: a piece is large beside one.
    queue: asyncio.Queue[tuple[Answer, Piece] | BaseException | None] = asyncio.Queue(len(answers))

    async def pump(answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                await queue.put((answer, piece))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(answer)) for answer in answers]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
