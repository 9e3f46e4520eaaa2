"""An HTTP client for streams that costs almost nothing per token.

It often shares the machine with the server it measures, so it does not parse the JSON of tokens:
it notes when an event with text came, and reads only the last events, which carry the counts.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

# Text of a completion, a chat delta or a reasoning delta that is not empty.
_HAS_TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning)"\s*:\s*"(?!")')
_DATA = re.compile(rb"^data:", re.MULTILINE)  # an id or an event name may come before it
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_MAX_ERROR = 300


@dataclass
class Outcome:
    """What one request experienced. Times are seconds on the monotonic clock."""

    sent: float = 0.0
    late: float = 0.0
    """Seconds between the planned and the actual start: above a few ms, the client is too busy."""
    arrivals: list[float] = field(default_factory=list)
    """When each event with text came."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    """The answer, when it was asked to be kept."""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Answered to the end."""
        return not self.error

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def latency(self) -> float:
        """Seconds to the last text."""
        return self.arrivals[-1] - self.sent

    @property
    def itls(self) -> list[float]:
        """Seconds between events with text."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None when there is no second."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Endpoint:
    """Where requests go."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, path: str, body: bytes | None = None) -> bytes:
        """The bytes of a request; POST when there is a body."""
        parts = urlsplit(self.url)
        lines = [f"{'GET' if body is None else 'POST'} {parts.path}{path} HTTP/1.1"]
        lines += [f"Host: {parts.netloc}", "Accept: */*"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Client:
    """A pool of keep-alive connections to one server. Use as an async context manager."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        parts = urlsplit(endpoint.url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()

    async def stream(self, path: str, body: bytes, *, keep_text: bool = False) -> Outcome:
        """Send a streaming request and wait for its end. Failures are in the outcome.

        Keeping the text costs nothing while the answer comes, and parsing it afterwards.
        """
        outcome = Outcome()
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect()
                outcome.sent = time.perf_counter()
                sink = _Stream(outcome, keep_text)
                status = await connection.exchange(self.endpoint.request(path, body), sink)
        except TimeoutError:
            outcome.error = f"no answer within {self._timeout_s:g} s"
        except (OSError, ConnectionError) as error:
            outcome.error = f"connection failed: {error}"
        else:
            self._release(connection)
            sink.finish(status)
        return outcome

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises OSError, TimeoutError."""
        async with asyncio.timeout(self._timeout_s):
            connection = await self._connect()
            sink = _Body()
            status = await connection.exchange(self.endpoint.request(path), sink)
            self._release(connection)
            return status, bytes(sink.body)

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return made

    def _release(self, connection: _Connection) -> None:
        if connection.usable:
            self._idle.append(connection)


class _Body:
    """Collects a body."""

    def __init__(self) -> None:
        self.body = bytearray()

    def feed(self, data: bytes) -> None:
        self.body += data


class _Stream:
    """Reads server-sent events into an outcome."""

    def __init__(self, outcome: Outcome, keep_text: bool = False) -> None:
        self._outcome = outcome
        self._kept: list[bytes] | None = [] if keep_text else None
        self._rest = b""
        self._usage = b""
        self._failure = b""
        self._done = False
        self._last = 0.0

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            found = _DATA.search(event)
            if found is None:
                continue  # a comment that keeps the connection open
            self._last = now
            payload = event[found.end() :]
            if payload.strip() == b"[DONE]":
                self._done = True
            elif _HAS_TEXT.search(payload):
                self._outcome.arrivals.append(now)
                if self._kept is not None:
                    self._kept.append(payload)
            if _USAGE.search(payload):
                self._usage = payload
            elif b'"error"' in payload and b'"choices"' not in payload:
                self._failure = payload

    def finish(self, status: int) -> None:
        """Judge the answer after its last byte."""
        outcome = self._outcome
        if status != 200 or self._failure:
            text = (self._failure or self._rest).decode(errors="replace")
            outcome.error = f"HTTP {status}: {text[:_MAX_ERROR]}"
        elif not self._done:
            outcome.error = "the stream ended without [DONE]"
        else:
            usage = json.loads(self._usage)["usage"] if self._usage else {}
            outcome.prompt_tokens = usage.get("prompt_tokens", 0)
            outcome.output_tokens = usage.get("completion_tokens") or len(outcome.arrivals)
            if not outcome.output_tokens:
                outcome.error = "no token came"
            elif not outcome.arrivals:  # tokens without text, such as control tokens
                outcome.arrivals.append(self._last)
            outcome.text = "".join(map(_text, self._kept or ()))


def _text(payload: bytes) -> str:
    """Text of a completion or a chat delta."""
    choice = json.loads(payload)["choices"][0]
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; one exchange at a time. httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._parser: Any = None
        self._sink: Any = None
        self._answer: asyncio.Future[int] | None = None
        self._lost = False

    @property
    def usable(self) -> bool:
        """Open, idle, and willing to carry another exchange."""
        return not self._lost and self._answer is None

    async def exchange(self, request: bytes, sink: _Body | _Stream) -> int:
        """Send a request, feed the answer's body to the sink, return the status.

        Raises ConnectionError when the connection ends first. Closed when cancelled.
        """
        import httptools

        self._sink, self._parser = sink, httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        """End the connection."""
        self._lost = True
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self._answer is None:  # nothing was asked: the server is about to close
            self.close()
            return
        import httptools

        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._lost = True
        self._fail(ConnectionError(str(exc or "the server closed the connection")))

    def on_body(self, body: bytes) -> None:
        """Called by httptools."""
        self._sink.feed(body)

    def on_message_complete(self) -> None:
        """Called by httptools."""
        if not self._parser.should_keep_alive():
            self._lost = True
            self._transport.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())

    def _fail(self, error: ConnectionError) -> None:
        self._lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
