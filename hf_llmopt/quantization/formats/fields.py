"""Fields of a `quantization_config`: what each may hold, and what is said where it holds something else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from ...errors import InvalidCheckpoint

REMEDY = (
    "The config.json was edited, or belongs to other weights: correct it, or take the one that the weights came with."
)


def need(config: Mapping[str, Any], *names: str) -> str:
    """The first of these names that is there."""
    for name in names:
        if name in config:
            return name
    close = get_close_matches(names[0], map(str, config), n=1)
    hint = f" Is {close[0]!r} meant to be it?" if close else ""
    raise InvalidCheckpoint(f"The quantization_config lacks {names[0]!r}.{hint} It has {', '.join(config)}. {REMEDY}")


def get(config: Mapping[str, Any], name: str, wanted: str, fits: Callable[[Any], bool], default: Any = None) -> Any:
    """A field's value, `default` where it is missing or null.

    Raises:
        InvalidCheckpoint: It is something else than what is wanted.
    """
    value = config.get(name)
    if value is None:
        return default
    if not fits(value):
        raise InvalidCheckpoint(f"quantization_config: {name!r} is {wanted}, got {value!r}. {REMEDY}")
    return value


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false."""
    return bool(get(config, name, "true or false", lambda value: isinstance(value, bool), default))


def bits(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Bits of a code, or of an input; which can be read, the scheme says."""
    value = get(config, name, "a positive integer", lambda value: is_integer(value) and value > 0, default)
    if value is None:
        raise InvalidCheckpoint(f"quantization_config: {name!r} is a positive integer, got null. {REMEDY}")
    return int(value)


def size(config: Mapping[str, Any], name: str) -> int:
    """A size of groups; -1 for all inputs, which null means too."""
    return int(get(config, name, "a positive integer, or -1 for all inputs", _is_size, -1))


def is_integer(value: Any) -> bool:
    """Whether it is one; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return is_integer(value) and (value > 0 or value == -1)


def is_list(value: Any) -> bool:
    """Whether it is one, as JSON or as Python has it."""
    return isinstance(value, (list, tuple))


def names(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Names of modules."""

    def fits(value: Any) -> bool:
        return is_list(value) and all(isinstance(part, str) for part in value)

    return tuple(get(config, name, "a list of strings, or null", fits, ()))


def mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; an empty one where it is missing or null."""
    found: Mapping[str, Any] = get(config, name, "an object, {...}, or null", lambda v: isinstance(v, Mapping), {})
    return found


def pattern(text: str) -> str:
    """A regular expression that compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise InvalidCheckpoint(
            f"The quantization_config has {text!r}, which is no regular expression: {error}."
        ) from None
    return text
