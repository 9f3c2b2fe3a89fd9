"""JSON of any size, beside the event loop: in parts, because Python's encoder lets no other thread run meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
MANY = 256  # tokens: what is made of fewer is made at once
SLICE = 256  # items


async def beside(tokens: int, work: Callable[[], T]) -> T:
    """Do something in a thread if it is about many tokens.

    Args:
        tokens: How many.
        work: What to do.
    """
    return work() if tokens <= MANY else await asyncio.to_thread(work)


def written(value: Any) -> Iterator[str]:
    """JSON of a value, in parts that take little time each.

    Example:
        >>> from hf_llmopt.serving.written import written
        >>> "".join(written({"a": [1, None, {"b": "c"}], "d": {}}))
        '{"a":[1,null,{"b":"c"}],"d":{}}'
    """
    if isinstance(value, dict):
        for place, (name, item) in enumerate(value.items()):
            yield f"{',' if place else '{'}{_json(name)}:"
            yield from written(item)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > SLICE:
        for start in range(0, len(value), SLICE):
            yield "," if start else "["
            yield _json(value[start : start + SLICE])[1:-1]
        yield "]"
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield "," if place else "["
            yield from written(item)
        yield "]" if value else "[]"
    else:
        yield _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
