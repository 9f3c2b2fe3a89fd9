"""What clients of several replicas talk to: it hands requests on, and tries again where a replica dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from .errors import APIError
from .hosts import check_host
from .limits import ClientGone, Limits, read_body
from .ray_request import ROUTERS, Asked, Start
from .streaming import DONE

ATTEMPTS = 3  # replicas that a request may lose before it fails
PATIENCE = 5.0  # seconds in which somebody has to say that he is well
LOST = APIError(503, "The replica that answered has died. Send the request again.", "replica_lost")


class Front:
    """Hands every request on to a replica, whole, and its answer back as it grows.

    A request whose replica dies before anything of its answer was sent goes to another one. Later, the answer ends with
    an error: what was sent cannot be taken back.

    Args:
        model: Ray's handle of the replicas.
        limits: Of bodies.
        hosts: Names that the server goes by, as of `create_app`.
    """

    def __init__(self, model: Any, limits: Limits, hosts: Collection[str] = ()) -> None:
        self._model = model.options(stream=True)
        self._limits = limits
        self._hosts = hosts

    async def __call__(self, request: Request) -> Response:
        """Answer one request; called by Ray."""
        try:
            asked = await self._read(request)
            if asked.path == "/metrics":
                return await self._metrics(asked)
            if asked.path == "/health":
                return await asyncio.wait_for(self._hand_on(asked), PATIENCE)
            return await self._hand_on(asked)
        except asyncio.TimeoutError:
            return JSONResponse({"status": "no replica answers"}, 503)
        except ClientGone:
            return Response(status_code=499)
        except APIError as error:
            return JSONResponse(error.body, error.status, error.headers)

    async def _read(self, request: Request) -> Asked:
        check_host(request.scope, self._hosts)
        body = b""
        if request.method == "POST":
            try:
                body = await read_body(request, self._limits)
            except APIError as error:
                if error.status != 415:  # which holds for some paths only: the replica knows
                    raise
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        return Asked(request.method, path, request.scope["query_string"], tuple(request.headers.raw), body)

    async def _hand_on(self, asked: Asked) -> Response:
        """The answer of a replica.

        Raises:
            APIError: No replica can answer.
        """
        for _ in range(ATTEMPTS):
            parts = self._model.answer.remote(asked)
            try:
                start = await anext(parts)
                # That an assistant answers is said before there is a token: until then another one can say it.
                held = [await anext(parts, b"")] if start.streams and asked.path.endswith("/chat/completions") else []
            except RayActorError:
                continue
            except BackPressureError as full:
                raise APIError(429, "Too many requests wait; come again later.", "engine_full") from full
            except asyncio.CancelledError:
                parts.cancel()  # the client left
                raise
            answer = StreamingResponse(_body(start, held, parts), start.status)
            answer.raw_headers = [*start.headers]
            return answer
        raise LOST

    async def _metrics(self, asked: Asked) -> Response:
        """The figures of every replica, each with its name."""
        names = sorted({name for router in list(ROUTERS) for name in router.replicas})
        texts = {}
        for name in names or [""]:  # one by one: Ray confuses calls of one request that are routed at the same time
            with suppress(RayActorError):  # it died meanwhile
                figures = await self._figures(asked.to(name))
                if figures.status != 200:
                    return Response(figures.body, figures.status, media_type="application/json")
                texts[name] = figures.body.decode()
        return Response(together(texts), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _figures(self, asked: Asked) -> Start:
        parts = self._model.answer.remote(asked)
        start: Start = await anext(parts)
        return Start(start.status, start.headers, start.body + b"".join([part async for part in parts]))


def together(texts: dict[str, str]) -> bytes:
    r"""Figures in Prometheus' text format by replica, as one text in which each has its replica's name.

    Example:
        >>> text = "# TYPE llmopt:a gauge\nllmopt:a 1.0\n"
        >>> print(together({"x": text, "y": text}).decode().splitlines()[2:])
        ['llmopt:a{replica="x"} 1.0', 'llmopt:a{replica="y"} 1.0']
    """
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.samples.append(sample._replace(labels={**sample.labels, "replica": name}))

    class Figures(CollectorRegistry):
        def collect(self) -> Any:
            return families.values()

    return generate_latest(Figures())


async def _body(start: Start, held: list[bytes], parts: Any) -> AsyncIterator[bytes]:
    """The body of an answer; the last event of a stream says so if the replica dies."""
    try:
        for part in (start.body, *held):
            yield part
        async for part in parts:
            yield part
    except RayActorError:
        if not start.streams:
            raise  # which closes the connection
        yield f"data: {json.dumps(LOST.body)}\n\n{DONE}".encode()
    finally:
        parts.cancel()  # if the client left
