"""The connection between rank 0 and another rank: what to do one way, signs of life the other.

    rank r ── HELLO {rank} ⇄ PROOF ──▶ rank 0    see `greeting`
           ◀─ WELCOME {store_port} ──
           ── BEAT vitals, every BEAT_S ▶
           ── FAILED {message} ─────▶            and the rank ends
           ◀─ STEP plan ────────────             again and again
           ◀─ CALL verb, answer ────▶            see `calls`
           ◀─ end of stream ────────             the rank ends

Another host's process (`node`) has one as well:

    node n ── HELLO {node} ⇄ PROOF ──▶ rank 0
           ── BEAT, every BEAT_S ───▶
           ◀─ START {options} ──────             and it starts that host's ranks
           ── ENDED {rank, how} ────▶            one has; the node ends the others, and itself
           ◀─ end of stream ────────             the same

A message is its kind (1 byte), its length (4 bytes, little-endian) and as many bytes. Steps do not
go through a collective: an idle engine waits for the next one without a time limit, their length
differs from step to step, and the end of this stream is how a rank knows that rank 0 is gone.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from quire.cluster.tls import TlsStream

if TYPE_CHECKING:
    import ssl

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
    CALL = 6
    PROOF = 7
    START = 8
    ENDED = 9


class Channel:
    """Messages over a stream socket, encrypted if it was made so. One thread may receive; any may
    send."""

    def __init__(self, sock: socket.socket, tls: TlsStream | None = None) -> None:
        self._sock, self._tls = sock, tls
        self._stream = tls or sock
        self._peer = str(sock.getpeername()[0])
        self._sending = threading.Lock()

    @classmethod
    def over(
        cls, sock: socket.socket, context: ssl.SSLContext | None, *, is_dialler: bool
    ) -> Channel:
        """With TLS where there is a context. Raises OSError when the handshake fails; the socket is
        closed then."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREACHABLE_S * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, UNREACHABLE_S // 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        try:
            tls = None if context is None else TlsStream(sock, context, server=not is_dialler)
            return cls(sock, tls)
        except OSError:
            sock.close()
            raise

    @property
    def has_pending(self) -> bool:
        """A message, or its beginning, has been taken from the socket already."""
        return self._tls is not None and self._tls.has_pending

    @property
    def has_arrived(self) -> bool:
        """Receiving would not wait for a message to begin."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        return self.has_pending or bool(poll.poll(0))

    @property
    def host(self) -> str:
        """This side's address."""
        return str(self._sock.getsockname()[0])

    @property
    def peer(self) -> str:
        """The other side's address."""
        return self._peer

    def fileno(self) -> int:
        """Of the socket, for waiting on it."""
        return self._sock.fileno()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send one message. Raises OSError when the other side is gone."""
        with self._sending:
            self._stream.sendall(_HEADER.pack(kind, len(payload)) + payload)

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
        return self.parse(*self.receive(max_bytes), wanted)

    @staticmethod
    def parse(kind: Kind, payload: bytes, wanted: Kind) -> dict[str, Any]:
        """The object in a message that must be of this kind. Raises ValueError."""
        value = json.loads(payload) if kind is wanted else None
        if not isinstance(value, dict):
            raise ValueError(f"expected {wanted.name}, not {kind.name}")
        return value

    def set_timeout(self, seconds: float | None) -> None:
        """How long sending and receiving may wait; None for ever."""
        self._sock.settimeout(seconds)

    def is_over(self, within_s: float = 0.0) -> bool:
        """The other side has ended the stream, or does so in time. Any thread."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLRDHUP)
        return bool(poll.poll(within_s * 1000))

    def close(self) -> None:
        """End the stream, also for a thread that waits on it."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._stream.recv_into(view)
            if not received:
                raise EOFError("the other side closed the connection")
            view = view[received:]
        return bytes(data)
