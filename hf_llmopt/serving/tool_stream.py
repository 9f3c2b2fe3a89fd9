"""Calls on their way: where a grammar makes sure of them, their arguments are shown while they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .text import overlap
from .tool_formats import Hermes, Llama3, ToolFormat

# What stands before a call's arguments, in any format, as `tool_formats` has grammars write it.
HEAD = re.compile(r'\{"name": "([\w.-]+)", "(?:arguments|parameters)": |\[TOOL_CALLS\]([\w.-]+)\[ARGS\]')


@dataclass
class Growth:
    """What came: text, and by call its name, where it is new, and more of its arguments."""

    text: str = ""
    calls: list[tuple[int, str | None, str]] = field(default_factory=list)


class GrowingCalls:
    r"""Reads an answer that obeys the rules of its format.

    Args:
        form: How the model writes calls.
        most: Calls that are given; others are dropped.

    Attributes:
        calls: How many there were.

    Example:
        >>> from hf_llmopt.serving.tool_formats import Hermes
        >>> from hf_llmopt.serving.tool_stream import GrowingCalls
        >>> growing = GrowingCalls(Hermes())
        >>> for piece in ('<tool_call>\n{"name": "now", "arguments": {"zo', 'ne": "UTC"}', '}\n</tool_call>'):
        ...     print(growing.add(piece).calls)
        [(0, 'now', '{"zo')]
        [(0, None, 'ne": "UTC"}')]
        []
    """

    def __init__(self, form: ToolFormat, most: int | None = None) -> None:
        self.calls = 0
        self._mark = form.marks[0]
        self._closing = form.marks[1] if isinstance(form, Hermes) else ""
        self._most = most
        self._held = ""
        # Each does what it can with what is held, and says whether another one goes on.
        self._state = self._beginning if isinstance(form, Llama3) else self._text
        self._arguments = _Object()
        self._growth = Growth()

    def add(self, text: str, ends: bool = False) -> Growth:
        """What a piece of text brings.

        Args:
            text: The piece.
            ends: Whether it is the last one.
        """
        self._growth = Growth()
        self._held += text
        while self._state():
            pass
        shown = self._state in (self._beginning, self._text) or not self.calls  # else it is the end of a call
        if ends and shown and (self._held.strip() or not self.calls):
            self._growth.text += self._held
        return self._growth

    def _beginning(self) -> bool:
        text = self._held.lstrip()
        if text:
            self._state = self._head if text.startswith("{") else self._plain
        return bool(text)

    def _plain(self) -> bool:
        self._growth.text += self._held
        self._held = ""
        return False

    def _text(self) -> bool:
        start = self._held.find(self._mark)
        before = self._held[: start if start >= 0 else len(self._held) - overlap(self._held, self._mark)].rstrip()
        self._growth.text += before
        self._held = self._held[len(before) :]
        if start >= 0:
            self._state = self._head
        return start >= 0

    def _head(self) -> bool:
        found = HEAD.search(self._held)
        if found is None:
            return False
        self._held = self._held[found.end() :]
        if self._most is None or self.calls < self._most:
            self._growth.calls.append((self.calls, found[1] or found[2], ""))
        self.calls += 1
        self._arguments = _Object()
        self._state = self._body
        return True

    def _body(self) -> bool:
        end = self._arguments.read(self._held)
        if end and (self._most is None or self.calls <= self._most):
            self._more(self._held[:end])
        self._held = self._held[end:]
        if not self._arguments.whole:
            return False
        self._state = self._behind if self._closing else self._head
        return True

    def _behind(self) -> bool:
        place = self._held.find(self._closing)
        if place < 0:
            return False
        self._held = self._held[place + len(self._closing) :]
        self._state = self._text
        return True

    def _more(self, text: str) -> None:
        """Arguments of the last call, in the entry that begins it if that is new."""
        number, calls = self.calls - 1, self._growth.calls
        if calls and calls[-1][0] == number:
            calls[-1] = (number, calls[-1][1], calls[-1][2] + text)
        else:
            calls.append((number, None, text))


class _Object:
    """Finds the end of a JSON object.

    Attributes:
        whole: Whether it came.
    """

    def __init__(self) -> None:
        self.whole = False
        self._depth = 0
        self._quoted = self._escaped = False

    def read(self, text: str) -> int:
        """How many of these characters belong to it."""
        for place, character in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._quoted = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth and character == "}":
                    self.whole = True
                    return place + 1
        return len(text)
