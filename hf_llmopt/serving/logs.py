"""One JSON object a line: who asked, how it ended, how long it took. No prompt and no key stands in it."""

from __future__ import annotations

import json
import logging
import re
import traceback
import uuid
from datetime import datetime, timezone
from time import monotonic

LOGGER = logging.getLogger("hf_llmopt.serving")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LONGEST_PATH = 128  # characters
PAUSE = 10.0  # seconds


class JSONFormatter(logging.Formatter):
    """A record as one line of JSON; fields stand in `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            # Where it happened and what it was; its message may quote a prompt.
            frames = traceback.extract_tb(error.__traceback__)
            line["error"] = type(error).__name__
            line["trace"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=False, default=str)


class Seldom(logging.Filter):
    """Lets a message of the same beginning through every ten seconds, with how often it was left out.

    asyncio writes one for each connection that it cannot accept, thousands a second where there are no file handles.
    Its further lines show objects, which may quote a prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is time for a message; it is cut to its first line."""
        event, now = record.getMessage().partition("\n")[0][:LONGEST_PATH], monotonic()
        last, left_out = self._last.get(event, (now - PAUSE, 0))
        if now - last < PAUSE:
            self._last[event] = (last, left_out + 1)
            return False
        if len(self._last) > 100:  # messages that differ each time
            self._last.clear()
        self._last[event] = (now, 0)
        record.msg, record.args, record.fields = event, (), {"left_out": left_out} if left_out else {}
        return True


def to_stderr() -> None:
    """Write the server's lines, uvicorn's, and, seldom, asyncio's to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    asyncio = logging.getLogger("asyncio")
    asyncio.filters = [Seldom()]
    for logger in (LOGGER, logging.getLogger("uvicorn.error"), asyncio):
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def path_text(path: str) -> str:
    """A path as it can stand in a log: its beginning, with what does not show escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path[:LONGEST_PATH])


def request_id(given: str | None) -> str:
    """The client's own name of a request if it can stand in a header and a log, else a new one."""
    return given if given is not None and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
