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


async def chat(service: Service, request: Request) -> Response:
    """Answer a chat.

    Raises:
        APIError: It cannot be answered.
        ClientGone: Nobody waits for the answer.
    """
    ask = parse(ChatRequest, await read_body(request, service.limits), request)
    service.check_model(ask.model)
    most = ask.max_completion_tokens if ask.max_completion_tokens is not None else ask.max_tokens
    n = ask.n or 1
    caller: Caller = request.state.caller
    shown = Shown((ask.top_logprobs or 0) if ask.logprobs else None)

    def work() -> list[Answer]:
        grammar = service.grammar(ask)
        ids = service.prompts.chat(ask, tools=ask.tool_choice != "none")
        return service.submit([ids], ask, most, caller, shown, grammar)

    answers = await service.in_thread(n, work)
    if service.log_prompts:
        request.state.note["messages"] = [message.model_dump(exclude_none=True) for message in ask.messages]
    note(request, answers, n)
    form = ChatForm(service, f"chatcmpl-{caller.request_id}", bool(ask.logprobs))
    return await respond(request, answers, n, form, ask)


class ChatForm:
    """How chats are written.

    Args:
        service: What is served.
        name: The answer's id.
        logprobs: Whether log-probabilities are shown.
    """

    def __init__(self, service: Service, name: str, logprobs: bool) -> None:
        self._tokenizer = service.prompts.tokenizer
        self._shows = logprobs
        self._head = {"id": name, "created": int(time.time()), "model": service.name}

    def envelope(self, choices: list[dict[str, Any]], streams: bool) -> dict[str, Any]:
        """What choices stand in."""
        return {**self._head, "object": "chat.completion.chunk" if streams else "chat.completion", "choices": choices}

    def opening(self, answer: Answer) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunk(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        """A choice of a stream."""
        delta = {"content": piece.text} if piece.text or piece.finish is None else {}
        return {"index": answer.index, "delta": delta, **self._rest([piece])}

    def choice(self, answer: Answer, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice of an answer in one piece."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        return {"index": answer.index, "message": message, **self._rest(pieces)}

    def _rest(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        entries = [entry for piece in pieces for entry in piece.logprobs]
        content = [
            {**self._token(entry.token, entry.logprob), "top_logprobs": [self._token(*top) for top in entry.top]}
            for entry in entries
        ]
        return {
            "logprobs": {"content": content, "refusal": None} if self._shows else None,
            "finish_reason": pieces[-1].finish,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": token_bytes(text)}
