"""The connection between rank 0 and another rank: what to do one way, signs of life the other.

    rank r ── HELLO {token, rank} ──▶ rank 0
           ◀─ WELCOME {store_port} ──
           ── BEAT, every BEAT_S ───▶
           ── FAILED {message} ─────▶          and the rank ends
           ◀─ STEP plan ────────────           again and again
           ◀─ KV verb, event ──────▶           see `kv`
           ◀─ end of stream ────────           the rank ends

A message is its kind (1 byte), its length (4 bytes, little-endian) and as many bytes. Steps do not
go through a collective: an idle engine waits for the next one without a time limit, their length
differs from step to step, and the end of this stream is how a rank knows that rank 0 is gone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from enum import IntEnum
from typing import Any

BEAT_S = 0.5
SILENCE_S = 5.0
"""A rank that has not been heard of for so long counts as hung."""
UNREACHABLE_S = 10
"""A peer host that acknowledges nothing for so long is gone."""
MAX_BYTES = 64 << 20
_HEADER = struct.Struct("<BI")


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    BEAT = 3
    FAILED = 4
    STEP = 5
    KV = 6


class Channel:
    """Messages over a stream socket. One thread may receive; any may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREACHABLE_S * 1000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, UNREACHABLE_S // 2)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)

    def fileno(self) -> int:
        """Of the socket, for waiting on it."""
        return self._sock.fileno()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send one message. Raises OSError when the other side is gone."""
        with self._sending:
            self._sock.sendall(_HEADER.pack(kind, len(payload)) + payload)

    def send_json(self, kind: Kind, value: dict[str, Any]) -> None:
        """Send one message whose payload is an object."""
        self.send(kind, json.dumps(value).encode())

    def receive(self, max_bytes: int = MAX_BYTES) -> tuple[Kind, bytes]:
        """The next message. Raises EOFError at the end of the stream, ValueError for what is no
        message, OSError (TimeoutError with `set_timeout`)."""
        kind, length = _HEADER.unpack(self._exactly(_HEADER.size))
        if length > max_bytes:
            raise ValueError(f"a message of {length} bytes is too long")
        return Kind(kind), self._exactly(length)

    def receive_json(self, wanted: Kind, max_bytes: int = 4096) -> dict[str, Any]:
        """The next message, which must be an object of this kind. Raises as `receive` does."""
        kind, payload = self.receive(max_bytes)
        value = json.loads(payload) if kind is wanted else None
        if not isinstance(value, dict):
            raise ValueError(f"expected {wanted.name}, not {kind.name}")
        return value

    def set_timeout(self, seconds: float | None) -> None:
        """How long sending and receiving may wait; None for ever."""
        self._sock.settimeout(seconds)

    def close(self) -> None:
        """End the stream, also for a thread that waits on it."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._sock.recv_into(view)
            if not received:
                raise EOFError("the other side closed the connection")
            view = view[received:]
        return bytes(data)
