"""Constrained output: grammars, and who of a sequence's next tokens obeys them. llguidance does the work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..errors import InvalidRequest, NotServed
from .lark import json_rule
from .schema_numbers import check_numbers

if TYPE_CHECKING:  # there are machines without a wheel of it, and all else is served there
    from llguidance import LLMatcher

LONGEST_GRAMMAR = 2**16  # characters
KEPT_GRAMMARS = 64
# What sequences compute of a grammar's lexer adds up, against a limit, if they begin as copies of one matcher. So each
# gets its own, but where that takes long.
LONG, SHARED = 0.05, 16  # seconds, and sequences
# Of llguidance. A compilation takes half a second at most, a step a hundredth, with some ten megabytes each.
COMPILATION, STATES, SYMBOLS = 200_000, 25_000, 200_000
# What to do about a refusal of llguidance, by words of it.
REMEDIES = {
    "Unimplemented keys": "Leave them out of the schema, and check the answer for them yourself",
    "look-around": "Leave it out of `pattern`, and check the answer for it yourself",
    "regex parse error": "Correct `pattern`, or leave it out and check the answer yourself",
    "Unknown format": "Leave `format` out, and check the answer for it yourself",
    "oneOf constraints": "Write `anyOf`, and check yourself that one alone holds",
    "without end": "Let a `$ref` to what it stands in be one of several choices, or an optional property",
    "retrieving it failed": "Copy it into `$defs` of this schema, and refer to it as `#/$defs/NAME`",
}


class Grammar:
    """A grammar, for `Engine.submit(constraint=...)`; each call makes the constraint of one sequence.

    Args:
        compile: Makes what follows one sequence.
        one: Held while it does: whoever sends many large grammars keeps one core busy, not all.
        again: Arguments with which `again` makes it in another process, which has to find the same: then no two
            sequences share what they compute. `None` if there is no other process.

    Attributes:
        seconds: That it took to compile.

    Raises:
        InvalidRequest: It cannot be compiled.
    """

    def __init__(self, compile: Callable[[], LLMatcher], one: Lock, again: tuple[Any, ...] | None = None) -> None:
        self._compile = compile
        self._one = one
        self._again = again
        with one:
            self._matcher: LLMatcher | None = self._made()

    def __call__(self) -> Sentence:
        """A constraint for one sequence."""
        with self._one:
            matcher = self._matcher or self._made()
            self._left -= 1
            self._matcher = matcher if self._left else None
            return Sentence(matcher.deep_copy() if self._left else matcher)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._again is None:
            raise TypeError("a grammar of one process")
        return again, self._again

    def _made(self) -> LLMatcher:
        began = perf_counter()
        matcher = self._compile()
        if not matcher.is_error():
            matcher.compute_bitmask()  # what every sequence begins with
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            remedy = next((f". {remedy}" for words, remedy in REMEDIES.items() if words in reason), "")
            raise InvalidRequest(reason + remedy)
        self.seconds = perf_counter() - began
        self._left = SHARED if self.seconds > LONG and self._again is None else 1
        return matcher


class Sentence:
    """One sequence that obeys a grammar.

    It follows the sequence's tokens and nothing else, so whatever becomes of the request's pages and drafts does not
    concern it.

    Args:
        matcher: At the beginning.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._read = 0
        self._mask: Tensor | None = None

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Which tokens may come behind these, as `Constraint` says.

        Raises:
            InvalidRequest: The grammar takes more time or memory than it may.
        """
        if self._mask is None or len(tokens) > self._read:
            self._matcher.consume_tokens(list(tokens[self._read :]))
            self._read = len(tokens)
            self._mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
            if self._matcher.is_error():
                raise InvalidRequest(f"The grammar of the output is too complex: {_reason(self._matcher.get_error())}.")
        return self._mask


class Grammars:
    """Compiles grammars for a tokenizer.

    Args:
        tokenizer: The model's; it must be a fast one.
        ends: Tokens that end a sequence.
        alone: Whether one process computes all sequences. Else others make the grammars again, by the tokenizer's name.

    Raises:
        NotServed: The tokenizer is not a fast one, nothing ends a sequence, or llguidance is not installed.

    Example:
        >>> from hf_llmopt import Engine, demo
        >>> from hf_llmopt.serving.grammar import Grammars
        >>> model, tokenizer = demo.load()
        >>> grammars = Grammars(tokenizer, [tokenizer.eos_token_id])
        >>> schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        >>> grammar = grammars.json_schema({**schema, "additionalProperties": False})
        >>> with Engine(model) as engine:
        ...     handle = engine.submit(tokenizer("x = ")["input_ids"], max_new_tokens=40, constraint=grammar)
        ...     text = tokenizer.decode(handle.result(), skip_special_tokens=True)
        >>> import json
        >>> list(json.loads(text))
        ['ok']
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int], alone: bool = True) -> None:
        ends = sorted(ends)
        if not ends:
            raise NotServed("no token ends this model's answers, so output cannot be constrained")
        try:
            from llguidance import LLMatcher, LLParserLimits
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError as error:
            raise NotServed(
                'output is constrained by llguidance: pip install "hf-llmopt[serve]", or in the checkout '
                "pip install '.[serve]'"
            ) from error
        try:
            own = from_tokenizer(tokenizer, eos_token=ends)
        except ValueError as error:
            raise NotServed(f"output cannot be constrained: {error}") from error
        limits = LLParserLimits(
            initial_lexer_fuel=COMPILATION,
            max_lexer_states=STATES,
            max_grammar_size=SYMBOLS,
            verbose_errors=False,  # what a client sent is not repeated
        )

        def match(grammar: str) -> LLMatcher:
            return LLMatcher(own, grammar, log_level=0, limits=limits)

        one, name = Lock(), None if alone else tokenizer.name_or_path

        def made(grammar: str) -> Grammar:
            return Grammar(partial(match, grammar), one, None if name is None else (name, tuple(ends), grammar))

        self._known = lru_cache(KEPT_GRAMMARS)(made)

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """The grammar of JSON that a schema allows, written compactly, with single blanks, or with line breaks.

        Raises:
            InvalidRequest: It is no schema, uses what is not supported, or is too large; the message says what.
        """
        return self.lark("start: " + json_rule(schema))

    def lark(self, grammar: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark.

        Raises:
            InvalidRequest: It is no grammar, or too large.
        """
        if len(grammar) > LONGEST_GRAMMAR:
            raise InvalidRequest(f"{len(grammar)} characters; at most {LONGEST_GRAMMAR} are compiled")
        check_numbers(grammar)
        return self._known(grammar)


@lru_cache(1)
def _grammars(name: str, ends: tuple[int, ...]) -> Grammars:
    return Grammars(AutoTokenizer.from_pretrained(name), ends, alone=False)


def again(name: str, ends: tuple[int, ...], grammar: str) -> Grammar:
    """A grammar that another process has compiled.

    Args:
        name: The tokenizer's.
        ends: Tokens that end a sequence.
        grammar: In llguidance's dialect of Lark.
    """
    return _grammars(name, ends).lark(grammar)


def _reason(error: str) -> str:
    """An error of the library in one line, without the text of the grammar that it points into."""
    if "NoExtensionBias" in error:
        return "No answer can obey it: the schema refers to itself without end"
    said = re.split(r"\n *\d+ \|", error, maxsplit=1)[0]
    said = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?|\. Enable '.*", "", said)
    return " ".join(said.replace("<non-verbose/>", "").split())[:300].rstrip(".")
