"""Many requests from a file, in OpenAI's batch format, on one engine; a run that was killed goes on where it ended."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineClosed, InvalidRequest
from .app import create_app
from .errors import RETRY_AFTER
from .journal import Journal, Key
from .service import Service

URLS = ("/v1/chat/completions", "/v1/completions")
FULL, CLOSED = 429, 503  # of HTTP: come again later, and never


@dataclass(frozen=True)
class Line:
    """A request of the input.

    Attributes:
        number: Of its line, from 1.
        custom_id: Its name, `None` if it has none.
        url: Where it goes.
        body: What is sent there, as JSON.
        error: Why it cannot be sent, or `None`.
    """

    number: int
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: str | None = None

    @property
    def key(self) -> Key:
        """What its result is known by."""
        return self.number if self.custom_id is None else self.custom_id


@dataclass(frozen=True)
class Response:
    """An answer of HTTP.

    Attributes:
        status: Its code.
        request_id: As the log has it.
        body: Parsed JSON.
    """

    status: int
    request_id: str
    body: Any


@dataclass
class Counts:
    """What became of the requests.

    Attributes:
        total: Requests of the input.
        before: Results that an earlier run left.
        answered: Requests that this run answered.
        failed: Those of them whose result is an error.
    """

    total: int = 0
    before: int = 0
    answered: int = 0
    failed: int = 0


Answerer = Callable[[Line], Awaitable[Response]]


def read(path: Path) -> Iterator[Line]:
    """The requests of a file; empty lines are none.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield _line(number, text)


def _line(number: int, text: bytes) -> Line:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Line(number, None, error="the line is no JSON")
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    if not isinstance(custom_id, str):
        return Line(number, None, error="the line is no object with a text as custom_id")
    if value.get("method", "POST") != "POST":
        return Line(number, custom_id, error="method: only 'POST' is allowed")
    url, body = value.get("url"), value.get("body")
    if url not in URLS:
        return Line(number, custom_id, error=f"url: allowed are {', '.join(map(repr, URLS))}")
    if not isinstance(body, dict):
        return Line(number, custom_id, error="body: an object is needed")
    if body.get("stream"):
        return Line(number, custom_id, error="body.stream: a batch has no streams")
    return Line(number, custom_id, url, json.dumps(body).encode())


def answerer(service: Service) -> Answerer:
    """Answers requests as the server would, without a socket."""
    app = create_app(service)

    async def answer(line: Line) -> Response:
        while True:
            response = await _call(app, line.url, line.body)
            if response.status == CLOSED:
                raise EngineClosed("The engine was closed while the batch ran.")
            if response.status != FULL:
                return response
            await asyncio.sleep(RETRY_AFTER)  # requests with many choices fill the line

    return answer


async def run(
    source: Path, target: Path, answer: Answerer, at_once: int, tell: Callable[[Counts, int], object] = lambda *_: None
) -> Counts:
    """Answer all requests of a file that have no result yet.

    Args:
        source: One request a line.
        target: One result a line, in the order in which they came; an unfinished one is gone on with.
        answer: Answers one.
        at_once: Requests that are answered at one time.
        tell: Called when results are on the disk, with the counts and how many came.

    Raises:
        InvalidRequest: A `custom_id` comes twice, or `target` is not of this `source`.
        OSError: A file cannot be read or written. What was written before stays, and a later run goes on.
    """
    with begun(source, target) as (journal, counts, left):
        tell(counts, counts.before)
        await _answer_all(left, answer, min(at_once, max(1, counts.total - counts.before)), journal, counts, tell)
    return counts


@contextmanager
def begun(source: Path, target: Path) -> Iterator[tuple[Journal, Counts, Iterator[Line]]]:
    """What is there of a file's results, the counts, and the requests that have none; raises what `run` does.

    Args:
        source: One request a line.
        target: One result a line.
    """
    if target.exists() and source.samefile(target):
        raise InvalidRequest(f"{str(source)!r} cannot be both input and output.")
    keys = _keys(source)
    with Journal(target) as journal:
        if foreign := journal.known - keys:
            raise InvalidRequest(
                f"{str(target)!r} has a result for {next(iter(foreign))!r}, which {str(source)!r} does not ask for. "
                "Give another file for the results."
            )
        left = (line for line in read(source) if line.key not in journal.known)
        yield journal, Counts(len(keys), len(journal.known)), left


def _keys(source: Path) -> set[Key]:
    """What the results of a file will be known by.

    Raises:
        InvalidRequest: Two results would be known by the same.
    """
    lines: dict[Key, int] = {}
    for line in read(source):
        if (before := lines.setdefault(line.key, line.number)) != line.number:
            raise InvalidRequest(
                f"custom_id {line.key!r} stands on lines {before} and {line.number} of {str(source)!r}; each request "
                "needs its own."
            )
    return set(lines)


async def _answer_all(
    lines: Iterator[Line],
    answer: Answerer,
    at_once: int,
    journal: Journal,
    counts: Counts,
    tell: Callable[[Counts, int], object],
) -> None:
    """Some requests at a time; results are written as they come, all that are there together."""
    new: list[dict[str, Any]] = []
    more = asyncio.Event()

    async def work() -> None:
        for line in lines:  # shared: each takes the next
            new.append(await result_of(line, answer))
            more.set()

    def write() -> None:
        if not new:
            return
        results = new.copy()
        new.clear()
        keep(results, journal, counts)  # the loop may wait: nobody else uses it, and the engine has its own thread
        tell(counts, len(results))

    tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
    everyone = asyncio.gather(*tasks)
    everyone.add_done_callback(lambda _: more.set())
    try:
        while not everyone.done():
            await more.wait()
            more.clear()
            write()
        await everyone
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        write()  # what is answered need not be answered again


def keep(results: Sequence[dict[str, Any]], journal: Journal, counts: Counts) -> None:
    """Put results on the disk, and count them.

    Raises:
        OSError: They cannot be written.
    """
    journal.add(results)
    counts.answered += len(results)
    counts.failed += sum(map(_failed, results))


async def result_of(line: Line, answer: Answerer) -> dict[str, Any]:
    """What stands in the output for a request."""
    result: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    if line.error is not None:
        error = {"code": "invalid_request", "message": line.error, "line": line.number}
        return {**result, "response": None, "error": error}
    got = await answer(line)
    response = {"status_code": got.status, "request_id": got.request_id, "body": got.body}
    return {**result, "response": response, "error": None}


def _failed(result: dict[str, Any]) -> bool:
    return result["response"] is None or result["response"]["status_code"] >= 400


async def _call(app: Any, path: str, body: bytes) -> Response:
    """Send a request to an ASGI application in this process, and wait for its whole answer."""
    start: dict[str, Any] = {}
    parts: list[bytes] = []
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.get_running_loop().create_future()  # this client never leaves
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    headers = {name.lower(): value for name, value in start["headers"]}
    return Response(start["status"], headers[b"x-request-id"].decode(), json.loads(b"".join(parts)))
