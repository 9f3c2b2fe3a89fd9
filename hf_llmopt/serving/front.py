"""What happens before and after every route: who may come in, under which id, and what the log says of it."""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter
from typing import Any

from fastapi.responses import JSONResponse

from .errors import CROWDED, APIError
from .hosts import check_host
from .limits import ClientGone
from .logs import LOGGER, path_text, request_id
from .service import Caller, Service

OPEN = ("/health", "/")  # need no key: a load balancer has none, and the page asks for it
WATCHED = ("/health", "/metrics")  # are answered to the end
CLOSED_BY_CLIENT = 499


class Front:
    """Middleware around the routes.

    Args:
        app: What it stands before.
        service: What is served.
        hosts: Names that it goes by, as of `hosts.check_host`.
    """

    def __init__(self, app: Any, service: Service, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._service = service
        self._hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request; called by the framework."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        began, name, status = perf_counter(), request_id(headers.get(b"x-request-id")), 0
        note: dict[str, Any] = {}
        # In the server's own scope too, which looks at the deadline of answers that nobody reads.
        state = scope["state"] = {**scope.get("state", {}), "note": note, "path": "other", "deadline": None}

        async def send_named(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        async def refuse(error: APIError) -> None:
            note["error"] = error.code
            if not status:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send_named)

        self._service.open += 1
        try:
            check_host(scope, self._hosts)
            key = self._let_in(scope["path"], headers.get(b"authorization", ""))
            state["caller"] = Caller(name, key, began)
            await self._app(scope, receive, send_named)
        except APIError as error:
            await refuse(error)
        except ClientGone:
            status = status or CLOSED_BY_CLIENT
            note["error"] = "client_gone"
        except Exception as error:
            LOGGER.error("a request failed", exc_info=error, extra={"fields": {"request_id": name}})
            await refuse(APIError(500, "The server failed; its log says where.", "internal_error"))
        finally:
            self._service.open -= 1
            self._service.metrics.http(state["path"], status)
            if scope["path"] not in WATCHED:
                fields = {
                    "request_id": name,
                    "method": scope["method"],
                    "path": path_text(scope["path"]),
                    "status": status,
                    "seconds": round(perf_counter() - began, 6),
                    **note,
                }
                LOGGER.info("request", extra={"fields": fields})

    def _let_in(self, path: str, authorization: str) -> str | None:
        """Whose key it is.

        Raises:
            APIError: There is none, or the server ends.
        """
        if path not in WATCHED and self._service.crowded():
            raise APIError(503, "Too many connections are open; come again later.", CROWDED)
        if path in OPEN:
            return None
        key = self._service.keys.owner(authorization) if len(self._service.keys) else None
        if len(self._service.keys) and key is None:
            raise APIError(401, "Send a valid key, as `Authorization: Bearer KEY`.", "invalid_api_key")
        if self._service.draining and path not in WATCHED:
            raise APIError(503, "The server is about to stop and takes no new requests.", "shutting_down")
        return key
