"""Rules of grammars in llguidance's dialect of Lark, as texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_CALLS = 16  # of tools, that may follow one another
# A blank, or a new line with its indentation: a model that knows no better could write blanks for ever.
WHITESPACE = r"( |\n[ \t]{0,40})?"


def json_rule(schema: dict[str, Any]) -> str:
    """What stands for JSON of a schema in the rules of a Lark grammar."""
    own = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
    return f"%json {json.dumps({**schema, 'x-guidance': own}, ensure_ascii=False)}"


def repeated(between: str, several: bool, name: str = "calls") -> str:
    """The rule of calls that may follow one another."""
    return f"{name}: call ({between} call){{0,{MOST_CALLS - 1}}}" if several else f"{name}: call"


def opened(mark: str) -> list[str]:
    """Rules of any text, and of one that ends with a mark: behind that it is a call."""
    kind = "[lazy]" if mark.startswith('"') else ""  # a special token is no part of any text
    return [f"opened{kind}: TEXT {mark}", r"TEXT: /(.|\n)*/"]


def objects(tools: Mapping[str, dict[str, Any]], arguments: str) -> list[str]:
    """Rules of a JSON object for each tool, written as templates write them."""
    heads = [quoted(f'{{"name": {json.dumps(name)}, "{arguments}": ') for name in tools]
    return alternatives(heads, tools.values(), quoted("}"))


def alternatives(heads: Sequence[str], schemas: Iterable[dict[str, Any]], tail: str) -> list[str]:
    """The rule `tool`, and one for each: what stands before its arguments, and behind them."""
    rules = [
        f"tool_{index}: {head} {json_rule(schema)} {tail}"
        for index, (head, schema) in enumerate(zip(heads, schemas, strict=True))
    ]
    return ["tool: " + " | ".join(f"tool_{index}" for index in range(len(rules))), *rules]


def quoted(text: str) -> str:
    """A text that has to come as it is."""
    return json.dumps(text)
