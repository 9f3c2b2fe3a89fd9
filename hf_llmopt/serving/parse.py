"""From bytes to a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, RootModel, ValidationError

from .errors import of_validation
from .limits import check_parts
from .schema import Body

B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], body: bytes, request: Request, unused: Sequence[str] = ()) -> B:
    """Read a body; which of its fields are ignored goes into the log.

    Args:
        kind: What it should be.
        body: Its bytes.
        request: Whose it is.
        unused: Fields of this kind that this server ignores.

    Raises:
        APIError: It is not JSON, or not of this kind, or has too many parts.
    """
    check_parts(body)
    try:
        ask = kind.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(
            error, skip=issubclass(kind, RootModel)
        ) from None  # the error shows what was given, which may be a prompt
    if isinstance(ask, Body):
        ignored = {*(ask.model_extra or ()), *(name for name in unused if getattr(ask, name) is not None)}
        if ignored:
            request.state.note["ignored"] = [name[:64] for name in sorted(ignored)[:16]]
    return ask
