"""From texts and chats to token ids."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from .errors import APIError
from .limits import Limits
from .schema import ChatMessages


class Prompts:
    """Tokenizes, within limits. Everything but the making may run in any thread.

    Args:
        tokenizer: The model's.
        vocabulary: How many token ids the model has.
        limits: Of the server.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._limits = limits
        # No text of more characters can be short enough: that is known without tokenizing it.
        self._most_characters = limits.max_model_len * max(map(len, tokenizer.get_vocab()), default=1)
        self._own = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)

    def text(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text.

        Raises:
            APIError: It is too long.
        """
        if len(text) > self._most_characters:
            raise APIError(
                400,
                f"This model's maximum context length is {self._limits.max_model_len} tokens; {len(text)} characters "
                "are more than that, however they are tokenized.",
                "context_length_exceeded",
                "prompt",
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def ids(self, ids: Sequence[int], param: str = "prompt") -> list[int]:
        """Ids that a client gave.

        Raises:
            APIError: The model has no such token.
        """
        if ids and max(ids) >= self._vocabulary:
            raise APIError(
                400, f"Token {max(ids)} does not exist; ids are below {self._vocabulary}.", "invalid_value", param
            )
        return list(ids)

    def shown(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of ids."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def chat(self, ask: ChatMessages, tools: bool = True, told: bool = False) -> list[int]:
        """Ids of a chat, as the model's template writes it.

        Args:
            ask: Messages, and how to render them.
            tools: Whether the template is told of the tools.
            told: Whether it has to tell the model of them.

        Raises:
            APIError: There is no template, or it refuses these messages, or leaves the tools out.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise APIError(
                400, "This model has no chat template; use /v1/completions.", "unsupported_parameter", "messages"
            )
        more = ask.chat_template_kwargs or {}
        if taken := sorted(self._own & set(more)):
            raise APIError(
                400,
                f"chat_template_kwargs may not set {', '.join(taken)}; it is for a template's own variables.",
                "invalid_value",
                "chat_template_kwargs",
            )
        offered = (ask.tools or None) if tools else None
        text = self._rendered(ask, offered, more)
        # Some templates write tools into the user's turn only, so they may be missing where a result is handed on.
        if told and offered and ask.messages[-1].role != "tool" and text == self._rendered(ask, None, more):
            raise APIError(
                400,
                "tools: this model's chat template leaves them out, so the model would not know of them. Describe them "
                "in a message, demand a call with tool_choice, or serve a model whose template writes tools.",
                "unsupported_parameter",
                "tools",
            )
        return self.text(text, special=False)  # the template writes them

    def _rendered(self, ask: ChatMessages, tools: list[dict[str, Any]] | None, more: dict[str, Any]) -> str:
        goes_on = bool(ask.continue_final_message)
        try:
            text: str = self.tokenizer.apply_chat_template(
                [_plain(message.model_dump(exclude_none=True)) for message in ask.messages],
                tools=tools,
                add_generation_prompt=not goes_on if ask.add_generation_prompt is None else ask.add_generation_prompt,
                continue_final_message=goes_on,
                tokenize=False,
                **more,
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise APIError(
                400, f"The chat template refuses these messages: {reason}", "invalid_value", "messages"
            ) from error
        return text


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: the arguments of calls are objects, not JSON in a string."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                continue  # it stays the text that it is
    message.setdefault("content", "")
    return message
