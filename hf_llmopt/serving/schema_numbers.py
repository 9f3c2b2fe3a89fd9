"""Numbers in JSON schemas that take llguidance too long, or that it would not obey."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from math import lcm
from typing import Any, cast

from ..errors import InvalidRequest

# An automaton that counts remainders has as many states as there are; ten thousand take 20 ms and some megabytes.
MOST_REMAINDERS = 10_000
LARGEST = 2**63 - 1  # llguidance takes a larger bound for this one
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # keys are no keywords in them
VALUES = ("const", "enum")
SAYS_NOTHING = ("default", "examples", "title", "description", "$comment", "$schema", "$id", "$defs", "definitions")
MARK = "%json "


def check_numbers(grammar: str) -> None:
    """Refuse numbers that cannot be held to.

    Args:
        grammar: In llguidance's dialect of Lark, with schemas in it.

    Raises:
        InvalidRequest: `multipleOf` needs too many states, or a number does not fit into 64 bits.
    """
    counted: dict[tuple[Any, ...], Decimal] = {}  # one automaton for what is the same
    together = False
    for schema in _schemas(grammar):
        for part in _parts(schema):
            _check_size(part)
            factor = part.get("multipleOf")
            if isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0:
                counted[(factor, *(repr(part.get(bound)) for bound in BOUNDS))] = Decimal(repr(factor))
            together |= _combines(part)
    factors = set(counted.values())
    if any(not 1 <= factor * MOST_REMAINDERS <= MOST_REMAINDERS**2 for factor in factors):
        raise _too_many()
    states = sum(int(factor.scaleb(_places(factor))) for factor in counted.values())
    places = max(map(_places, factors), default=0)
    common = lcm(*(int(factor.scaleb(places)) for factor in factors)) if together else 0
    if max(states, common) > MOST_REMAINDERS:
        raise _too_many()


def _places(factor: Decimal) -> int:
    """Digits behind the point."""
    return max(0, -cast(int, factor.normalize().as_tuple().exponent))


def _too_many() -> InvalidRequest:
    return InvalidRequest(
        f"`multipleOf` is at most {MOST_REMAINDERS} (all of a schema together; their least common multiple where "
        "schemas are combined; digits behind the point count). Leave it out, and check the answer for it yourself"
    )


def _schemas(grammar: str) -> Iterator[Any]:
    """The JSON schemas in a grammar."""
    decoder, place = json.JSONDecoder(), grammar.find(MARK)
    while place >= 0:
        try:
            schema, end = decoder.raw_decode(grammar, place + len(MARK))
        except (ValueError, RecursionError):
            return  # llguidance says what is wrong
        yield schema
        place = grammar.find(MARK, end)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all in it, in no order."""
    left: list[tuple[Any, bool]] = [(schema, False)]
    while left:
        part, named = left.pop()
        if isinstance(part, list):
            left += [(item, False) for item in part]
        elif isinstance(part, dict) and named:
            left += [(item, False) for item in part.values()]
        elif isinstance(part, dict):
            yield part
            left += [(item, key in NAMED) for key, item in part.items() if key not in (*VALUES, "default", "examples")]


def _check_size(part: dict[str, Any]) -> None:
    """Refuse numbers of one schema that do not fit into 64 bits."""
    for key, value in part.items():
        left = [value] if key in VALUES or isinstance(value, int | float) else []
        while left:
            item = left.pop()
            if isinstance(item, list | dict):
                left += item.values() if isinstance(item, dict) else item
            elif (isinstance(item, int) or (key in BOUNDS and isinstance(item, float))) and abs(item) > LARGEST:
                raise InvalidRequest(
                    f"`{key}` is a number beyond 64 bits. Give {-LARGEST} to {LARGEST}, or leave it out, and check "
                    "the answer for it yourself"
                )


def _combines(part: dict[str, Any]) -> bool:
    """Whether one value may have to obey several schemas."""
    said = [key for key in part if key not in (*SAYS_NOTHING, "x-guidance")]
    return any(key in ("allOf", "patternProperties") for key in said) or (
        len(said) > 1 and any(key in ("$ref", "anyOf", "oneOf") for key in said)
    )
