"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ..errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineFull,
    InvalidOption,
    InvalidRequest,
    LLMOptError,
    NotServed,
    OutOfPages,
    PromptTooLong,
    RequestCancelled,
)

CROWDED = "too_many_connections"
RETRY_AFTER = 1  # seconds
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# What an engine's error means to a client. The first class that fits counts.
MEANINGS: tuple[tuple[type[LLMOptError], int, str], ...] = (
    (PromptTooLong, 400, "context_length_exceeded"),
    (OutOfPages, 400, "context_length_exceeded"),
    (InvalidRequest, 400, "invalid_value"),
    (InvalidOption, 400, "invalid_value"),
    (NotServed, 400, "unsupported_parameter"),
    (EngineFull, 429, "engine_full"),
    (RequestCancelled, 499, "cancelled"),
    (EngineClosed, 503, "shutting_down"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
)


class APIError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: Of HTTP.
        message: What was wrong, and what is allowed.
        code: For programs.
        param: The field that was wrong.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, or not to: OpenAI's clients repeat what ends with 5xx unless they are told."""
        if self.status in (429, 503):
            closes = {"Connection": "close"} if self.code == CROWDED else {}
            return {"Retry-After": str(RETRY_AFTER), **closes}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


class FieldError(ValueError):
    """A value that is of the right type, and not allowed.

    Args:
        message: Why.
        code: For programs.
        param: The field, where it is not the one that is looked at.
    """

    def __init__(self, message: str, code: str = "unsupported_parameter", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def of_engine(error: LLMOptError) -> APIError:
    """What an error of the engine means to a client."""
    for kind, status, code in MEANINGS:
        if isinstance(error, kind):
            return APIError(status, str(error), code)
    return APIError(500, str(error), "engine_error")


def of_validation(error: ValidationError, skip: int = 0) -> APIError:
    """The first thing that is wrong with a body. The value itself is not repeated: it may be a prompt.

    Args:
        error: Of pydantic.
        skip: How many names of kinds stand before that of the field.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return APIError(400, f"The body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}", "invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    found = first.get("ctx", {}).get("error")
    place = first["loc"][skip:]
    where = ".".join(map(str, place))
    if isinstance(found, FieldError):
        param = found.param or str(place[0])
        return APIError(400, f"{where or param}: {message}", found.code, param)
    if not where:
        return APIError(400, "The body must be a JSON object.", "invalid_type")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return APIError(400, f"{where}: {message}", code, str(place[0]))
