"""How models write calls of tools: read them out of an answer, and say as a grammar what one has to look like.

What is not a whole, well-formed call of a tool that was offered stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from .lark import MOST_CALLS, alternatives, objects, opened, quoted, repeated
from .text import overlap

DECODER = json.JSONDecoder()
# Marks of one answer that begin no call; behind them all is text. To look at one takes as long as what follows it.
MOST_WRONG = 256


@dataclass(frozen=True)
class Call:
    """A tool's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclass
class Found:
    """What became certain: text to be shown, and calls."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)


class ToolFormat(Protocol):
    """One way to write calls.

    Attributes:
        name: As `--tool-parser` has it.
        marks: Texts around calls, which a tokenizer may have as special tokens; those are shown to `split`.
        short_ids: Templates of the format refuse longer ids of calls than nine characters.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    short_ids: ClassVar[bool]

    def written_by(self, template: str) -> bool:
        """Whether a chat template tells models to write calls so."""
        ...

    def split(self, text: str, offered: Collection[str], begins: bool, ends: bool) -> tuple[Found, str]:
        """Part what is certain from what is not.

        Args:
            text: What is not certain yet.
            offered: Names of tools.
            begins: Whether nothing of the answer was certain before.
            ends: Whether nothing follows. Then all is certain.

        Returns:
            What is certain, and the rest of the text.
        """
        ...

    def rules(
        self, tools: Mapping[str, dict[str, Any]], several: bool, free: bool, literal: Callable[[str], str]
    ) -> list[str]:
        """Lark's rules for calls; the first one is `calls`.

        Args:
            tools: The schema of each tool's arguments.
            several: Whether calls may follow one another.
            free: Whether there may be text beside calls, or no call.
            literal: Says how a text stands in a rule; marks may be special tokens.
        """
        ...


class Hermes:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, and many after them."""

    name: ClassVar[str] = "hermes"
    marks: ClassVar[tuple[str, ...]] = ("<tool_call>", "</tool_call>")
    short_ids: ClassVar[bool] = False
    _begin = re.compile(r"[ \t\n\r]*(?=\{)")
    _end = re.compile(r"[ \t\n\r]*(</tool_call>|\Z)")

    def written_by(self, template: str) -> bool:
        """Whether a chat template tells models to write calls so; some write XML between the same marks."""
        return self.marks[0] in template and "<function=" not in template

    def split(self, text: str, offered: Collection[str], begins: bool, ends: bool) -> tuple[Found, str]:
        """Part what is certain from what is not."""
        opening = self.marks[0]
        found = Found()
        done = looked = wrong = 0  # what is before `done` became certain, before `looked` no other call begins
        while wrong < MOST_WRONG and (start := text.find(opening, looked)) >= 0:
            looked = start + len(opening)
            call, end = self._first(text, looked, offered, ends)
            if call is None and ends:  # there may be one behind it
                wrong += 1
                continue
            before = text[done:start].rstrip()
            found.text += before
            if call is None:
                return found, text[done + len(before) :]
            found.calls.append(call)
            done = looked = end
        text = text[done:]
        shown = len(text)
        if not ends:  # blanks before a call are no text, nor are those behind the last one
            shown = len(text[: shown - overlap(text, opening)].rstrip())
        elif found.calls:
            text = text.rstrip()
        found.text += text[:shown]
        return found, text[shown:]

    def _first(self, text: str, start: int, offered: Collection[str], ends: bool) -> tuple[Call | None, int]:
        """The call that begins at a place of a text, and where it ends with its last mark."""
        begin = self._begin.match(text, start)
        if begin is None or (not ends and text.find(self.marks[1], start) < 0):
            return None, start
        try:
            value, last = DECODER.raw_decode(text, begin.end())
        except (ValueError, RecursionError):
            return None, start
        end = self._end.match(text, last)
        if end is None or not (end[1] or ends):  # models leave the last mark away, where a token ends the answer
            return None, start
        return _call(value, offered), end.end()

    def rules(
        self, tools: Mapping[str, dict[str, Any]], several: bool, free: bool, literal: Callable[[str], str]
    ) -> list[str]:
        """Lark's rules for calls."""
        opening, closing = map(literal, self.marks)
        if free:
            head = [f"calls: (opened body){'*' if several else '?'} TEXT", *opened(opening)]
        else:
            head = [repeated('"\\n"', several), f"call: {opening} body"]
        return [*head, f'body: "\\n" tool "\\n" {closing}', *objects(tools, "arguments")]


class Llama3:
    """`{"name": ..., "parameters": {...}}` as the whole answer: Llama 3.1 to 3.3."""

    name: ClassVar[str] = "llama3_json"
    marks: ClassVar[tuple[str, ...]] = ("<|python_tag|>",)
    short_ids: ClassVar[bool] = False

    def written_by(self, template: str) -> bool:
        """Whether a chat template tells models to write calls so."""
        return self.marks[0] in template or '"parameters": ' in template

    def split(self, text: str, offered: Collection[str], begins: bool, ends: bool) -> tuple[Found, str]:
        """Part what is certain from what is not."""
        (mark,) = self.marks
        start = text.lstrip()
        could = begins and (start.startswith(("{", mark)) or mark.startswith(start))
        if could and not ends:
            return Found(), text
        calls = self._calls(start.removeprefix(mark), offered) if could else None
        return (Found(text) if calls is None else Found(calls=calls)), ""

    def _calls(self, text: str, offered: Collection[str]) -> list[Call] | None:
        """The calls of which a text consists, or `None` if that is not all."""
        calls: list[Call] = []
        while text := text.lstrip(" \n\t;"):
            value, text = _leading(text)
            if (call := _call(value, offered)) is None:
                return None
            calls.append(call)
        return calls or None

    def rules(
        self, tools: Mapping[str, dict[str, Any]], several: bool, free: bool, literal: Callable[[str], str]
    ) -> list[str]:
        """Lark's rules for calls; these models make one at a time."""
        head = ["calls: tool | PLAIN?", r"PLAIN: /[^{ \n\t](.|\n)*/"] if free else ["calls: tool"]
        return [*head, *objects(tools, "parameters")]


class Mistral:
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`, and of late `[TOOL_CALLS]name[ARGS]{...}`."""

    name: ClassVar[str] = "mistral"
    marks: ClassVar[tuple[str, ...]] = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    short_ids: ClassVar[bool] = True
    _named = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")

    def __init__(self, names_first: bool = False) -> None:
        self.names_first = names_first  # what a grammar demands; both are read

    def written_by(self, template: str) -> bool:
        """Whether a chat template tells models to write calls so."""
        return self.marks[0] in template

    def split(self, text: str, offered: Collection[str], begins: bool, ends: bool) -> tuple[Found, str]:
        """Part what is certain from what is not."""
        mark = self.marks[0]
        start = text.find(mark)
        before = text[: start if start >= 0 else len(text) - overlap(text, mark)].rstrip()  # no blanks before a call
        if not ends:
            return Found(before), text[len(before) :]
        calls = None if start < 0 else self._calls(text[start:], offered)
        return (Found(text) if calls is None else Found(before, calls)), ""

    def _calls(self, text: str, offered: Collection[str]) -> list[Call] | None:
        calls: list[Call] = []
        while text := text.strip().removeprefix(self.marks[0]).lstrip():
            if text.startswith(self.marks[0]):
                continue
            named = self._named.match(text)
            value, text = _leading(text if named is None else text[named.end() :])
            values = value if isinstance(value, list) and named is None else [value]
            for item in values:
                call = _call(item if named is None else {"name": named[1], "arguments": item}, offered)
                if call is None:
                    return None
                calls.append(call)
        return calls or None

    def rules(
        self, tools: Mapping[str, dict[str, Any]], several: bool, free: bool, literal: Callable[[str], str]
    ) -> list[str]:
        """Lark's rules for calls."""
        mark, args, _ = map(literal, self.marks)
        if self.names_first:
            heads = [f"{quoted(name)} {args}" for name in tools]
            own = alternatives(heads, tools.values(), "")
            if free:
                more = f"({mark} tool){{0,{MOST_CALLS - 1}}}" if several else ""
                return [f"calls: TEXT | opened tool {more}", *opened(mark), *own]
            return [repeated("", several), f"call: {mark} tool", *own]
        begin = ["calls: TEXT | opened list", *opened(mark)] if free else [f"calls: {mark} list"]
        listed = repeated('", "', several, "listed")
        return [*begin, 'list: " "? "[" listed "]"', listed, "call: tool", *objects(tools, "arguments")]


FORMATS: tuple[ToolFormat, ...] = (Mistral(), Hermes(), Llama3())
NAMES = tuple(known.name for known in FORMATS)


def of_template(template: Any, name: str | None = None) -> ToolFormat | None:
    """The format in which a model writes calls.

    Args:
        template: The tokenizer's chat template: a text, several by name, or none.
        name: Of a format; `None` for what the template tells.

    Returns:
        The format, or `None` if the template tells of none that is known.
    """
    text = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    told = (known for known in FORMATS if (known.written_by(text) if name is None else known.name == name))
    found = next(told, None)
    return Mistral("[ARGS]" in text) if isinstance(found, Mistral) else found


class Reader:
    """Reads the calls of one answer as its text comes.

    Args:
        form: How the model writes them.
        offered: Names of tools.
        most: Calls that are given; others are dropped.

    Attributes:
        calls: How many there were.

    Example:
        >>> from hf_llmopt.serving.tool_formats import Reader, of_template
        >>> reader = Reader(of_template(None, "hermes"), ["now"])
        >>> for piece in ("Well. <tool", '_call>{"name": "now", "arg', 'uments": {"zone": "UTC"}}</tool_call>'):
        ...     print(reader.add(piece))
        Found(text='Well.', calls=[])
        Found(text='', calls=[])
        Found(text='', calls=[Call(name='now', arguments='{"zone": "UTC"}')])
    """

    def __init__(self, form: ToolFormat, offered: Collection[str], most: int | None = None) -> None:
        self._format = form
        self._offered = offered
        self._most = most
        self._held = ""
        self._begins = True
        self.calls = 0

    def add(self, text: str, ends: bool = False) -> Found:
        """What a piece of text makes certain.

        Args:
            text: The piece.
            ends: Whether it is the last one.
        """
        found, self._held = self._format.split(self._held + text, self._offered, self._begins, ends)
        self._begins &= not (found.text or found.calls)
        if self._most is not None:
            del found.calls[max(0, self._most - self.calls) :]
        self.calls += len(found.calls)
        if ends and self.calls and not found.text.strip():
            found.text = ""
        return found


def _json(text: str) -> Any:
    """The value that a text is, or `None`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _leading(text: str) -> tuple[Any, str]:
    """The JSON value with which a text begins, or `None`, and what stands behind it."""
    try:
        value, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None, text
    return value, text[end:]


def _call(value: Any, offered: Collection[str]) -> Call | None:
    """The call that a JSON value is, or `None`."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in offered:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write them as JSON in JSON
        arguments = _json(arguments)
    written = _written(arguments) if isinstance(arguments, dict) else None
    return None if written is None else Call(value["name"], written)


def _written(arguments: dict[str, Any]) -> str | None:
    """Arguments as JSON, `None` where that has no such numbers."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which was written as an escape
        text = json.dumps(arguments)
    return text
