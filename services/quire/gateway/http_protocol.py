"""uvicorn's HTTP/1.1 protocol with bounds on what comes before the body.

The server itself accepts any number of headers and waits for ever for the end of them. Refusals
are JSON in OpenAI's shape, like every other error.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from quire.api.errors import ApiError
from quire.api.sse import encode_json
from quire.gateway.scope import ABORT_EXTENSION

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)

MAX_URL_BYTES = 8 << 10
MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 100
HEAD_TIMEOUT_S = 10.0
"""From the first byte of a request, or the opening of the connection, to the end of its head."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._received = 0  # bytes since the head began; some may belong to what came before
        self._header_bytes = 0
        self._refusal: ApiError | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a request."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that grows without an end."""
        if self.transport.is_closing():
            return
        if self._in_head:
            self._received += len(data)
        super().data_received(data)
        # a single header is buffered by the parser and reported only when complete
        if self._in_head and self._received > MAX_URL_BYTES + MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head, self._received, self._header_bytes = True, 0, 0
        abort: Any = self.transport.abort  # not data, as the specification wants it
        self.scope["extensions"] = {ABORT_EXTENSION: abort}
        self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        """Part of the URL."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._fail(ApiError("url_too_long", f"The URL is over {MAX_URL_BYTES} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A complete header."""
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > MAX_HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            self._fail(_headers_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The body, if any, comes next; it has limits of its own."""
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by the base class when parsing fails."""
        error = self._refusal or ApiError("invalid_value", "The request is not valid HTTP/1.1.")
        self._refuse(error)

    def _fail(self, error: ApiError) -> None:
        self._refusal = error
        raise httptools.HttpParserError(error.code)

    def _refuse(self, error: ApiError) -> None:
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        body = encode_json(error.body())
        head = (
            b"content-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        if self.scope is None:  # opened, and nothing was ever asked
            self.transport.close()
            return
        message = f"The request's headers did not arrive within {HEAD_TIMEOUT_S:g} seconds."
        self._refuse(ApiError("request_timeout", message))


def _headers_too_large() -> ApiError:
    message = f"The headers are over {MAX_HEADER_BYTES} bytes or {MAX_HEADERS} in number."
    return ApiError("headers_too_large", message)
