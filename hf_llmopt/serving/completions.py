"""`/v1/completions`: texts go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ..generation import TokenLogprob
from .answer import Answer, Piece
from .errors import APIError
from .limits import read_body
from .parse import parse
from .schema import MOST_CHOICES, CompletionRequest
from .service import Caller, Service, Shown
from .streaming import note, respond
from .text import TextStream
from .tokens import finite, token_text

DEFAULT_TOKENS = 16  # OpenAI's


async def completions(service: Service, request: Request) -> Response:
    """Answer a completion request.

    Raises:
        APIError: It cannot be answered.
        ClientGone: Nobody waits for the answer.
    """
    ask = parse(CompletionRequest, await read_body(request, service.limits), request, service.unused)
    service.check_model(ask.model)
    prompts, n = ask.prompts, ask.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise APIError(400, f"{len(prompts)} prompts with n={n} are more than {MOST_CHOICES} answers.", None, "prompt")
    most = DEFAULT_TOKENS if ask.max_tokens is None else ask.max_tokens
    if not most and not ask.echo:
        raise APIError(400, "max_tokens=0 is only allowed with echo=true.", "invalid_value", "max_tokens")
    caller: Caller = request.state.caller
    shown = Shown(ask.logprobs, ask.logprobs if ask.echo else None)

    def work() -> list[Answer]:
        grammar = service.grammar(ask)
        special = ask.add_special_tokens is not False
        ids = [
            service.prompts.text(prompt, special) if isinstance(prompt, str) else service.prompts.ids(prompt)
            for prompt in prompts
        ]
        if not all(ids):
            raise APIError(400, "A prompt is empty; give at least one token.", "invalid_value", "prompt")
        return service.submit(ids, ask, most, caller, shown, grammar)

    answers = await service.in_thread(len(prompts) * n, work, ask.json_schema is not None)
    if service.log_prompts:
        request.state.note["prompt"] = ask.prompt
    request.state.deadline = service.deadline(ask)
    note(request, answers, n)
    form = CompletionForm(service, f"cmpl-{caller.request_id}", ask)
    return await respond(request, answers, n, form, ask)


class CompletionForm:
    """How completions are written.

    Args:
        service: What is served.
        name: The answer's id.
        ask: The request.
    """

    def __init__(self, service: Service, name: str, ask: CompletionRequest) -> None:
        self._service = service
        self._ask = ask
        self._head = {"id": name, "object": "text_completion", "created": int(time.time()), "model": service.name}
        self._echoed: set[Answer] = set()
        self._prompts: dict[int, str] = {}  # by the id of a prompt, which its answers share

    def envelope(self, choices: list[dict[str, Any]], streams: bool) -> dict[str, Any]:
        """What choices stand in."""
        return {**self._head, "choices": choices}

    def opening(self, answer: Answer) -> list[dict[str, Any]]:
        """Nothing comes before the first piece: an echo needs figures that come with it."""
        return []

    def chunk(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        """A choice of a stream; the first one begins with the echo."""
        first = answer not in self._echoed
        self._echoed.add(answer)
        return self._choice(answer, [piece], first)

    def choice(self, answer: Answer, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice of an answer in one piece."""
        return self._choice(answer, pieces, True)

    def _choice(self, answer: Answer, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
        prompt = self._prompt(answer) if self._ask.echo else ""
        text = (prompt if first else "") + "".join(piece.text for piece in pieces)
        return {
            "index": answer.index,
            "text": text,
            "logprobs": None if self._ask.logprobs is None else self._logprobs(answer, pieces, prompt, first),
            "finish_reason": pieces[-1].finish,
        }

    def _prompt(self, answer: Answer) -> str:
        if id(answer.prompt) not in self._prompts:
            skips = self._ask.skip_special_tokens is not False
            self._prompts[id(answer.prompt)] = self._service.prompts.shown(answer.prompt, skips)
        return self._prompts[id(answer.prompt)]

    def _logprobs(self, answer: Answer, pieces: Sequence[Piece], prompt: str, first: bool) -> dict[str, Any]:
        tokenizer = self._service.prompts.tokenizer
        entries: list[tuple[int, TokenLogprob | None, int]] = []  # token, its figures, where its text begins
        if first and self._ask.echo:
            text = TextStream(tokenizer, [], skip_special_tokens=self._ask.skip_special_tokens is not False)
            for token, entry in zip(answer.prompt, [None, *answer.handle.prompt_logprobs], strict=False):
                entries.append((token, entry, text.length))
                text.add(token)
        for piece in pieces:
            for entry, offset in zip(piece.logprobs, piece.offsets, strict=True):
                entries.append((entry.token, entry, len(prompt) + offset))
        return {
            "tokens": [token_text(tokenizer, token) for token, _, _ in entries],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for _, entry, _ in entries],
            "top_logprobs": [None if entry is None else self._top(tokenizer, entry) for _, entry, _ in entries],
            "text_offset": [offset for _, _, offset in entries],
        }

    def _top(self, tokenizer: Any, entry: TokenLogprob) -> dict[str, float]:
        # Tokens of the same text, halves of characters say, are one entry: the likeliest.
        found = [*entry.top, (entry.token, entry.logprob)]
        return {token_text(tokenizer, token): finite(logprob) for token, logprob in reversed(found)}
