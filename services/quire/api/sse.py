"""Server-sent events, as bytes."""

from __future__ import annotations

import msgspec.json

encode_json = msgspec.json.encode
"""Any JSON value as compact UTF-8 bytes."""

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would otherwise collect the stream into one answer
    (b"x-accel-buffering", b"no"),
)


def event(data: bytes, number: int) -> bytes:
    """One numbered event; `data` is JSON, so it holds no line break."""
    return b"id: %d\ndata: %b\n\n" % (number, data)
