"""One JSON object a line: who asked, how it ended, how long it took. No prompt and no key stands in it."""

from __future__ import annotations

import json
import logging
import re
import traceback
import uuid
from datetime import datetime, timezone

LOGGER = logging.getLogger("hf_llmopt.serving")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LONGEST_PATH = 128  # characters


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


def to_stderr() -> None:
    """Write the server's lines, and uvicorn's, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    for logger in (LOGGER, logging.getLogger("uvicorn.error")):
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def path_text(path: str) -> str:
    """A path as it can stand in a log: its beginning, with what does not show escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path[:LONGEST_PATH])


def request_id(given: str | None) -> str:
    """The client's own name of a request if it can stand in a header and a log, else a new one."""
    return given if given is not None and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
