"""The outermost layer: every request gets an id, an answer in OpenAI's shape, and a log line.

Pure ASGI: Starlette's BaseHTTPMiddleware hides the client's disconnect from what is inside it.
"""

from __future__ import annotations

import logging
import secrets
import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from quire.api.errors import ApiError
from quire.gateway.json_response import send_error
from quire.gateway.replies import ClientGone
from quire.gateway.scope import MAX_HEADER, connection_abort, header, path_of, sanitized
from quire.telemetry.logging import request_context

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from quire.gateway.traffic import Traffic

logger = logging.getLogger(__name__)
access = logging.getLogger("quire.access")

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
CLIENT_CLOSED = 499
"""Logged and counted, never sent: nobody is there to read it."""
QUIET = frozenset({"/livez", "/readyz", "/startupz", "/health", "/ping", "/metrics", "/load"})
"""Probes come every few seconds: logged at debug."""


class Boundary:
    """Wraps the whole application. `routes` are the known paths, the labels of the metrics."""

    def __init__(
        self, app: ASGIApp, traffic: Traffic, routes: frozenset[str], *, log_access: bool
    ) -> None:
        self._app = app
        self._traffic = traffic
        self._routes = routes
        self._log_access = log_access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises nothing: every error becomes an answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = sanitized(header(scope, b"x-request-id")) or secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        scope["app"] = self  # makes Starlette raise its 404 and 405 instead of answering them
        response = _Response(send, request_id)
        began = time.monotonic()
        with request_context(request_id):
            try:
                await self._answer(scope, receive, response)
            finally:
                self._note(scope, response.status, time.monotonic() - began)

    async def _answer(self, scope: Scope, receive: Receive, response: _Response) -> None:
        try:
            await self._app(scope, receive, response.send)
        except HTTPException as error:
            await self._refuse(_no_route(scope, error), response, error.headers or {})
        except (ClientGone, ConnectionError):
            response.status = CLIENT_CLOSED
        except ApiError as error:
            await self._refuse(error, response)
        except Exception:  # the one place where a bug becomes an answer
            logger.exception("error while answering %s", sanitized(scope["path"]))
            message = "The server had an error while processing the request."
            if response.status:
                connection_abort(scope)()
            await self._refuse(ApiError("internal_error", message), response)

    async def _refuse(
        self, error: ApiError, response: _Response, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        self._traffic.failed(error.code)
        if not response.status:  # otherwise the stream has said so itself
            extra = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
            await send_error(response.send, error, extra)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = path_of(scope)
        route = path if path in self._routes else "other"
        self._traffic.answered(route, status or CLIENT_CLOSED, seconds)
        if self._log_access:
            level = logging.DEBUG if path in QUIET else logging.INFO
            shown = sanitized(path)
            access.log(level, "%s %s %d %.0f ms", scope["method"], shown, status, seconds * 1000)


def _no_route(scope: Scope, error: HTTPException) -> ApiError:
    """The router's refusals, in our words."""
    if error.status_code == 405:
        return ApiError("method_not_allowed", f"{scope['method']} is not allowed here.")
    path = path_of(scope)[:MAX_HEADER]
    return ApiError("unknown_url", f"Unknown request URL: {scope['method']} {path}.")


class _Response:
    """The response as it leaves: with the request's id, its status noted."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._header = (b"x-request-id", request_id.encode("latin-1"))
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._header]
        await self._send(message)
