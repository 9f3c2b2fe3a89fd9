"""Many requests from a file, in OpenAI's batch format, on one engine; a run that was killed goes on where it ended."""

from __future__ import annotations

import asyncio
import hashlib
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
from .journal import Journal, Key, Made, made
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

    @property
    def fingerprint(self) -> str:
        """Of what its result depends on."""
        return hashlib.sha256(f"{self.url}\n{self.error}\n".encode() + self.body).hexdigest()[:16]


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
        failed: Requests whose result is an error, those of earlier runs too.
    """

    total: int = 0
    before: int = 0
    answered: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Work:
    """A file of requests, and what is there of its results.

    Attributes:
        journal: The results.
        lines: Requests that have none yet.
        counts: What became of all.
        setting: Fingerprint of who answers, `""` if unknown.
    """

    journal: Journal
    lines: Iterator[Line]
    counts: Counts
    setting: str = ""


Answerer = Callable[[Line], Awaitable[Response]]
Tell = Callable[[Counts, int], object]


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


@contextmanager
def begun(source: Path, target: Path, setting: str = "", retry_failed: bool = False) -> Iterator[Work]:
    """What is there of a file's results, and what is left to do.

    Args:
        source: One request a line.
        target: One result a line, in the order in which they came; an unfinished one is gone on with.
        setting: Fingerprint of who answers, `""` if unknown.
        retry_failed: Drop results that are errors, so that their requests are left to do.

    Raises:
        InvalidRequest: A `custom_id` comes twice, or `target` is not of this `source` and `setting`.
        OSError: A file cannot be read or written. What was written before stays, and a later run goes on.
    """
    if target.exists() and source.samefile(target):
        raise InvalidRequest(f"{str(source)!r} cannot be both input and output.")
    asked = _asked(source)
    with Journal(target) as journal:
        for key, how in journal.known.items():
            if not (retry_failed and how.failed):
                _check(key, how, asked, setting, source, target)
        if retry_failed and any(how.failed for how in journal.known.values()):
            journal.drop_failed()
        failed = sum(how.failed for how in journal.known.values())
        lines = (line for line in read(source) if line.key not in journal.known)
        yield Work(journal, lines, Counts(len(asked), len(journal.known), failed=failed), setting)


def _check(key: Key, how: Made, asked: dict[Key, str], setting: str, source: Path, target: Path) -> None:
    """Refuse a result that is not of this run.

    Raises:
        InvalidRequest: It is of another.
    """
    name = f"custom_id {key!r}" if isinstance(key, str) else f"line {key}"
    if key not in asked:
        why = f"{str(source)!r} does not ask for it"
    elif how.request not in (None, asked[key]):
        why = f"its request in {str(source)!r} has changed since"
    elif setting and how.setting not in (None, "", setting):
        why = (
            "another model gave it, or other options that change answers (the served name, dtype, max_model_len, the "
            "tool parser, quantization, the type and eviction of pages)"
        )
    else:
        return
    remedy = "Give another output file" + (", or retry failed ones (--retry-failed)." if how.failed else ".")
    raise InvalidRequest(f"{str(target)!r} has a result for {name}, and {why}. {remedy}")


def _asked(source: Path) -> dict[Key, str]:
    """What the results of a file will be known by, and the requests' fingerprints.

    Raises:
        InvalidRequest: Two results would be known by the same.
    """
    lines: dict[Key, int] = {}
    asked: dict[Key, str] = {}
    for line in read(source):
        asked[line.key] = line.fingerprint
        if (before := lines.setdefault(line.key, line.number)) != line.number:
            raise InvalidRequest(
                f"custom_id {line.key!r} stands on lines {before} and {line.number} of {str(source)!r}; each request "
                "needs its own."
            )
    return asked


async def run(work: Work, answer: Answerer, at_once: int, tell: Tell = lambda *_: None) -> Counts:
    """Answer all requests of a file that have no result yet.

    Results are written as they come, all that are there together.

    Args:
        work: What `begun` gave.
        answer: Answers one.
        at_once: Requests that are answered at one time.
        tell: Called when results are on the disk, with the counts and how many came.

    Raises:
        OSError: A file cannot be read or written. What was written before stays, and a later run goes on.
    """
    tell(work.counts, work.counts.before)
    new: list[dict[str, Any]] = []
    more = asyncio.Event()

    async def take() -> None:
        for line in work.lines:  # shared: each takes the next
            new.append(await result_of(line, answer, work.setting))
            more.set()

    def write() -> None:
        if not new:
            return
        results = new.copy()
        new.clear()
        keep(results, work)  # the loop may wait: nobody else uses it, and the engine has its own thread
        tell(work.counts, len(results))

    at_once = min(at_once, max(1, work.counts.total - work.counts.before))
    tasks = [asyncio.ensure_future(take()) for _ in range(at_once)]
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
        if everyone.done() and not everyone.cancelled():
            everyone.exception()  # else asyncio complains that nobody looked at it
        write()  # what is answered need not be answered again
    return work.counts


def keep(results: Sequence[dict[str, Any]], work: Work) -> None:
    """Put results on the disk, and count them.

    Raises:
        OSError: They cannot be written.
    """
    work.journal.add(results)
    work.counts.answered += len(results)
    work.counts.failed += sum(made(result).failed for result in results)


async def result_of(line: Line, answer: Answerer, setting: str) -> dict[str, Any]:
    """What stands in the output for a request, with fingerprints of it and of who answered."""
    marks = {"request": line.fingerprint, "setting": setting}
    result: dict[str, Any] = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "fingerprint": marks,
    }
    if line.error is not None:
        error = {"code": "invalid_request", "message": line.error, "line": line.number}
        return {**result, "response": None, "error": error}
    got = await answer(line)
    response = {"status_code": got.status, "request_id": got.request_id, "body": got.body}
    return {**result, "response": response, "error": None}


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
