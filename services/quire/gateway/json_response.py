"""JSON responses, errors among them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quire.api.sse import encode_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import Send

    from quire.api.errors import ApiError

MAX_RETRY_AFTER_S = 60
"""OpenAI's SDK gives up at once when it is told to wait for more than two minutes."""
CLOSES = frozenset({408, 413})
"""Statuses after which the rest of the request may still be on its way: close the connection."""


async def send_json(
    send: Send, status: int, body: Any, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send a whole response."""
    data = encode_json(body)
    length = (b"content-length", str(len(data)).encode())
    all_headers = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": data})


async def send_error(
    send: Send, error: ApiError, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send an error as an HTTP status with OpenAI's body."""
    extra = list(headers)
    if error.retry_after_s is not None:
        wait_s = min(error.retry_after_s, MAX_RETRY_AFTER_S)
        extra += [
            (b"retry-after", str(math.ceil(wait_s)).encode()),
            (b"retry-after-ms", str(round(wait_s * 1000)).encode()),
        ]
    if error.status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    if error.status in CLOSES:
        extra.append((b"connection", b"close"))
    await send_json(send, error.status, error.body(), extra)
