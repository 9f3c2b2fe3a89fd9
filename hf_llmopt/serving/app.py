"""The routes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response

from .. import __version__
from ..errors import InvalidOption
from .chat import chat
from .completions import completions
from .description import describe
from .errors import APIError
from .front import Front
from .hosts import known_hosts
from .limits import read_body
from .page import HEADERS, PAGE
from .parse import parse
from .schema import DetokenizeRequest, TokenizeChat, TokenizeRequest
from .service import Service

ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^:/?#@\s]+)(?::(\d+))?", re.IGNORECASE)
PORTS = {"http": "80", "https": "443"}  # which browsers leave away
NO_ROUTE = (
    (404, "not_found", "There is no such path. Those of OpenAI's API begin with /v1; GET /openapi.json has them all."),
    (405, "method_not_allowed", "The path does not know this method; the header `Allow` names those that it knows."),
)
Route = Callable[[Service, Request], Awaitable[Response]]


def create_app(service: Service, origins: Sequence[str] = (), hosts: Sequence[str] = ()) -> FastAPI:
    """The application for a service, to be run by any ASGI server; it closes the service when it ends.

    Args:
        service: What is served.
        origins: Origins whose web pages may read answers, `"*"` for all; by default no page of another origin may.
        hosts: Names that the server goes by besides `localhost` and its addresses, `"*"` for all. With none, requests
            from other machines may use any name.

    Raises:
        InvalidOption: An origin is none, and no browser would ever send it, or a name of a host is none.

    Example:
        >>> from hf_llmopt import Engine, demo
        >>> from hf_llmopt.serving import Service, create_app
        >>> model, tokenizer = demo.load()
        >>> app = create_app(Service(Engine(model), tokenizer, "demo"))
        >>> "/v1/completions" in app.openapi()["paths"]
        True
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="hf_llmopt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    posts: dict[str, Route] = {
        "/v1/completions": completions,
        "/v1/chat/completions": chat,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    gets: dict[str, Route] = {
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/health": health,
        "/metrics": metrics,
    }
    for path, route in posts.items():
        _add(app, service, path, route, "POST")
    for path, route in gets.items():
        _add(app, service, path, route, "GET")
    _add(app, service, "/", page, "GET", include_in_schema=False)
    _add(app, service, "/health", health, "HEAD", include_in_schema=False)  # some load balancers ask so
    for status, code, says in NO_ROUTE:
        app.add_exception_handler(status, partial(_no_route, status, code, says))
    app.add_middleware(Front, service=service, hosts=known_hosts(hosts))
    if origins:
        _open_to(app, known_origins(origins))
    describe(app, keys=len(service.keys) > 0)
    return app


def known_origins(origins: Sequence[str]) -> list[str]:
    """Origins as browsers send them: in small letters, without the port that their scheme has anyway.

    Args:
        origins: As of `create_app`.

    Raises:
        InvalidOption: One is no origin, and no browser would ever send it.

    Example:
        >>> from hf_llmopt.serving.app import known_origins
        >>> known_origins(["https://App.Example:443", "http://localhost:3000"])
        ['https://app.example', 'http://localhost:3000']
    """
    return [origin if origin == "*" else _known(origin) for origin in origins]


def _known(origin: str) -> str:
    found = ORIGIN.fullmatch(origin)
    if found is None:
        raise InvalidOption(
            f"{origin!r} is no origin: it is * or a scheme, a host and maybe a port, as http://localhost:3000."
        )
    scheme, host, port = found[1].lower(), found[2].lower(), found[3]
    return f"{scheme}://{host}" + ("" if port in (None, PORTS.get(scheme)) else f":{port}")


def _open_to(app: FastAPI, origins: Sequence[str]) -> None:
    """Answer browsers' questions before they reach the routes: they carry no key."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After", "X-Request-Id"],
    )


def _add(app: FastAPI, service: Service, path: str, route: Route, method: str, **more: Any) -> None:
    async def answer(request: Request) -> Response:
        request.state.path = path
        return await route(service, request)

    # The bodies are read and checked by the routes themselves: their size first.
    app.add_api_route(path, answer, methods=[method], name=route.__name__, description=route.__doc__, **more)


async def _no_route(status: int, code: str, says: str, request: Request, error: Exception) -> Response:
    return JSONResponse(APIError(status, says, code).body, status, getattr(error, "headers", None))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "hf_llmopt",
        "max_model_len": service.limits.max_model_len,
    }


async def page(service: Service, request: Request) -> Response:
    """A page to chat with the model and to watch the engine."""
    return HTMLResponse(PAGE, headers=HEADERS)


async def models(service: Service, request: Request) -> Response:
    """List the served model."""
    return JSONResponse({"object": "list", "data": [_card(service)]})


async def model(service: Service, request: Request) -> Response:
    """Describe the served model."""
    service.check_model(request.path_params["name"])
    return JSONResponse(_card(service))


async def health(service: Service, request: Request) -> Response:
    """Say whether new requests are taken."""
    if service.draining:
        return JSONResponse({"status": "draining"}, 503)
    return JSONResponse({"status": "ok"})


async def metrics(service: Service, request: Request) -> Response:
    """Give figures to Prometheus."""
    text, kind = service.metrics.text()
    return Response(text, media_type=kind)


async def tokenize(service: Service, request: Request) -> Response:
    """Say which tokens a text or a chat is."""
    ask = parse(TokenizeRequest, await read_body(request, service.limits), request).root
    service.check_model(ask.model)
    if isinstance(ask, TokenizeChat):
        ids = await service.in_thread(0, lambda: service.prompts.chat(ask))
    else:
        special = ask.add_special_tokens is not False
        ids = await service.in_thread(0, lambda: service.prompts.text(ask.prompt, special))
    return JSONResponse({"count": len(ids), "max_model_len": service.limits.max_model_len, "tokens": ids})


async def detokenize(service: Service, request: Request) -> Response:
    """Say which text tokens are."""
    ask = parse(DetokenizeRequest, await read_body(request, service.limits), request)
    service.check_model(ask.model)
    if len(ask.tokens) > service.limits.max_model_len:
        raise APIError(
            400,
            f"This model's maximum context length is {service.limits.max_model_len} tokens; these are "
            f"{len(ask.tokens)}.",
            "context_length_exceeded",
            "tokens",
        )
    ids = service.prompts.ids(ask.tokens, "tokens")
    text = await service.in_thread(0, lambda: service.prompts.shown(ids, False))
    return JSONResponse({"prompt": text})
