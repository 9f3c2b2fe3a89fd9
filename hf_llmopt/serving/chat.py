"""`/v1/chat/completions`: chats go on, as the model's template writes them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from .answer import Answer, Piece
from .limits import read_body
from .parse import parse
from .schema import ChatRequest
from .service import Caller, Service, Shown
from .streaming import note, respond
from .tokens import finite, token_bytes, token_text
from .tool_formats import Reader
from .tool_stream import GrowingCalls
from .tools import Tools


async def chat(service: Service, request: Request) -> Response:
    """Answer a chat.

    Raises:
        APIError: It cannot be answered.
        ClientGone: Nobody waits for the answer.
    """
    ask = parse(ChatRequest, await read_body(request, service.limits), request, service.unused)
    service.check_model(ask.model)
    most = ask.max_completion_tokens if ask.max_completion_tokens is not None else ask.max_tokens
    n = ask.n or 1
    caller: Caller = request.state.caller
    shown = Shown((ask.top_logprobs or 0) if ask.logprobs else None)

    tokenizer = service.prompts.tokenizer
    tools = Tools.of(ask, tokenizer, service.tool_parser)

    def work() -> list[Answer]:
        grammar = service.grammar(ask)
        rules = None if tools is None else tools.grammar(tokenizer, ask.json_schema)
        if rules is not None:
            grammar = service.compiled(lambda known: known.lark(rules), "tools")
        marks = tools is not None and tools.shows_marks(tokenizer)
        ids = service.prompts.chat(ask, ask.tool_choice != "none", ask.demanded is None)
        return service.submit([ids], ask, most, caller, shown, grammar, marks)

    answers = await service.in_thread(n, work, ask.json_schema is not None or tools is not None)
    if service.log_prompts:
        request.state.note["messages"] = [message.model_dump(exclude_none=True) for message in ask.messages]
    request.state.deadline = service.deadline(ask)
    note(request, answers, n)
    grows = tools is not None and tools.held(ask.json_schema)  # streamed or not, the same text
    form = ChatForm(service, f"chatcmpl-{caller.request_id}", bool(ask.logprobs), tools, grows)
    return await respond(request, answers, n, form, ask)


class ChatForm:
    """How chats are written.

    Args:
        service: What is served.
        name: The answer's id.
        logprobs: Whether log-probabilities are shown.
        tools: What may be called, `None` for nothing.
        grows: Whether calls are well-formed, so that they can be shown before they are whole.
    """

    def __init__(
        self, service: Service, name: str, logprobs: bool, tools: Tools | None = None, grows: bool = False
    ) -> None:
        self._tokenizer = service.prompts.tokenizer
        self._shows = logprobs
        self._tools = tools
        self._grows = grows
        self._readers: dict[Answer, Reader | GrowingCalls] = {}
        self._head = {"id": name, "created": int(time.time()), "model": service.name}

    def envelope(self, choices: list[dict[str, Any]], streams: bool) -> dict[str, Any]:
        """What choices stand in."""
        return {**self._head, "object": "chat.completion.chunk" if streams else "chat.completion", "choices": choices}

    def opening(self, answer: Answer) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunk(self, answer: Answer, piece: Piece) -> dict[str, Any] | None:
        """A choice of a stream, `None` while it may be a part of a call."""
        text, calls, finish = self._read(answer, [piece], self._grows)
        if not (text or calls or piece.logprobs or finish):
            return None
        delta: dict[str, Any] = {"content": text} if text or not (calls or finish) else {}
        if calls:
            delta["tool_calls"] = calls
        return {"index": answer.index, "delta": delta, **self._rest([piece], finish)}

    def choice(self, answer: Answer, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice of an answer in one piece."""
        whole = pieces[-1].finish == "stop"  # a call that is cut off stays text
        text, calls, finish = self._read(answer, pieces, self._grows and whole)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        if calls:  # only deltas are numbered
            message["tool_calls"] = [{name: call[name] for name in call if name != "index"} for call in calls]
        return {"index": answer.index, "message": message, **self._rest(pieces, finish)}

    def _read(
        self, answer: Answer, pieces: Sequence[Piece], grows: bool
    ) -> tuple[str, list[dict[str, Any]], str | None]:
        """Text, calls, and why the answer ended, of the next pieces."""
        text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish
        if self._tools is None:
            return text, [], finish
        reader = self._readers.setdefault(answer, self._tools.reader(grows))
        if isinstance(reader, GrowingCalls):
            growth = reader.add(text, ends=finish is not None)
            text, calls = growth.text, growth.calls
        else:
            before, found = reader.calls, reader.add(text, ends=finish is not None)
            text, calls = found.text, [(before + n, call.name, call.arguments) for n, call in enumerate(found.calls)]
        ended = "tool_calls" if reader.calls and finish == "stop" else finish
        return text, self._tools.entries(calls), ended

    def _rest(self, pieces: Sequence[Piece], finish: str | None) -> dict[str, Any]:
        entries = [entry for piece in pieces for entry in piece.logprobs]
        content = [
            {**self._token(entry.token, entry.logprob), "top_logprobs": [self._token(*top) for top in entry.top]}
            for entry in entries
        ]
        return {
            "logprobs": {"content": content, "refusal": None} if self._shows else None,
            "finish_reason": finish,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": token_bytes(text)}
