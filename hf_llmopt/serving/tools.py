"""Tools in a chat: how the model is held to call one, and how its calls are handed on."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import APIError
from .lark import json_rule, quoted
from .schema import ChatRequest
from .tool_formats import NAMES, Hermes, Reader, ToolFormat, of_template
from .tool_stream import GrowingCalls

SHORT_ID = 9  # characters
APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties")


@dataclass(frozen=True)
class Tools:
    """What a chat may call, and how its model writes that.

    Attributes:
        form: The format.
        functions: The schema of each function's arguments.
        demanded: Functions of which at least one has to be called, `None` if the model decides.
        several: Whether an answer may have more than one call.
        strict: Functions whose arguments obey their schemas, also where the model decides to call them.
    """

    form: ToolFormat
    functions: dict[str, dict[str, Any]]
    demanded: Sequence[str] | None
    several: bool
    strict: frozenset[str] = frozenset()

    @classmethod
    def of(cls, ask: ChatRequest, tokenizer: Any, parser: str | None) -> Tools | None:
        """The tools of a request, or `None` if there are none, or nothing is known of how the model calls them.

        Args:
            ask: The request.
            tokenizer: Its chat template tells the format.
            parser: Name of the format, or `"none"`; `None` for what the template tells.

        Raises:
            APIError: A call is demanded of a server that leaves calls in the text.
        """
        if not ask.functions:
            return None
        if parser == "none" and ask.demanded is not None:
            raise APIError(
                400,
                "tool_choice: this server leaves calls in the text (--tool-parser none), so none can be demanded. "
                f"Start it with a format, one of {', '.join(NAMES)}, or leave the choice to the model.",
                "unsupported_parameter",
                "tool_choice",
            )
        form = of_template(getattr(tokenizer, "chat_template", None), parser)
        if form is None and ask.demanded is not None:
            form = Hermes()
        several = ask.parallel_tool_calls is not False and ask.tool_choice in (None, "auto", "required")
        return None if form is None else cls(form, ask.functions, ask.demanded, several, ask.strict)

    def reader(self, grows: bool) -> Reader | GrowingCalls:
        """Reads the calls of one answer.

        Args:
            grows: Whether a grammar holds it to well-formed calls, so that they can be shown before they are whole.
        """
        most = None if self.several else 1
        return GrowingCalls(self.form, most) if grows else Reader(self.form, self.functions, most)

    def held(self, answer: dict[str, Any] | None) -> bool:
        """Whether a grammar holds the model to well-formed calls, and to nothing that looks like them.

        Args:
            answer: The schema of an answer that is no call, `None` for any.
        """
        return self.demanded is not None or (answer is None and bool(self.strict))

    def shows_marks(self, tokenizer: Any) -> bool:
        """Whether special tokens have to be shown for calls to be seen."""
        return any(_special(tokenizer, mark) is not None for mark in self.form.marks)

    def grammar(self, tokenizer: Any, answer: dict[str, Any] | None) -> str | None:
        """What an answer has to be, in Lark's words; `None` for anything.

        Args:
            tokenizer: The model's.
            answer: The schema of an answer that is no call, `None` for any.
        """
        if self.demanded is None and answer is None and not self.strict:
            return None

        def literal(mark: str) -> str:
            token = _special(tokenizer, mark)
            return quoted(mark) if token is None else f"<[{token}]>"

        free = self.demanded is None and answer is None
        names = self.functions if self.demanded is None else self.demanded
        tools = {
            name: {"type": "object"} if free and name not in self.strict else _closed(self.functions[name])
            for name in names
        }
        rules = self.form.rules(tools, self.several, free, literal)
        if self.demanded is None and answer is not None:
            return "\n".join(["start: calls | answer", f"answer: {json_rule(answer)}", *rules])
        return "\n".join(["start: calls", *rules])

    def entries(self, calls: Iterable[tuple[int, str | None, str]]) -> list[dict[str, Any]]:
        """Calls as OpenAI's API has them.

        Args:
            calls: The number of each in its answer; its name, `None` where only more of its arguments came; arguments.
        """
        return [
            {"index": number, "function": {"arguments": arguments}}
            if name is None
            else {
                "index": number,
                "id": uuid.uuid4().hex[:SHORT_ID] if self.form.short_ids else f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for number, name, arguments in calls
        ]


def _special(tokenizer: Any, text: str) -> int | None:
    """The special token that a text is, or `None`."""
    token = tokenizer.get_added_vocab().get(text)
    return token if token is not None and tokenizer.added_tokens_decoder[token].special else None


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of arguments, an object; those that it does not name are not made up, unless it speaks of them."""
    if "additionalProperties" in schema or any(name in schema for name in APPLICATORS):
        return {**schema, "type": "object"}
    return {**schema, "type": "object", "additionalProperties": False}
