"""Shows what the worker does until it is ready: one moving line on a terminal, else log lines."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from quire.config.cluster import ClusterConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import grpc

    from quire.proto import worker_pb2

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0
RETRY_S = 0.05
"""Between two attempts to reach a worker that does not listen yet."""


class Display(Protocol):
    """Shows a start-up phase; `done` ends the display."""

    def show(self, text: str) -> None:
        """Show the current state; called for every change."""

    def done(self) -> None:
        """Nothing more is coming."""


class TerminalLine:
    """One line that is written over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, text: str) -> None:
        """Replace the line."""
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()

    def done(self) -> None:
        """Clear the line."""
        self.show("")


class LogLines:
    """A log record per phase, and one every 5 s while a phase lasts."""

    def __init__(self) -> None:
        self._phase, self._last = "", float("-inf")

    def show(self, text: str) -> None:
        """Log the text if the phase is new or the last record is old."""
        phase, now = text.partition(" ")[0], time.monotonic()
        if phase != self._phase or now - self._last >= LOG_INTERVAL_S:
            self._phase, self._last = phase, now
            logger.info("start-up: %s", text)

    def done(self) -> None:
        """Nothing to clear."""


class Quiet:
    """Shows nothing."""

    def show(self, text: str) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""


def display_for(stream: TextIO | None = None) -> Display:
    """A moving line when the stream is a terminal."""
    stream = stream or sys.stderr
    return TerminalLine(stream) if stream.isatty() else LogLines()


@dataclass
class StartupWatch:
    """Follows a worker through its starts, and starts again when it has died and come back."""

    address: str
    """gRPC address; nobody needs to listen there yet."""
    display: Display
    on_ready: Callable[[str], Awaitable[None]]
    """Called once for each worker that became ready, with its model."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    _state: worker_pb2.Startup | None = None
    _began: float = 0.0

    async def run(self) -> None:
        """Follow until cancelled."""
        import grpc

        from quire.cluster.rpc import Cluster

        ticker = asyncio.create_task(self._tick())
        backoff = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        try:
            async with Cluster(self.cluster).channel(self.address, backoff) as channel:
                while True:
                    try:
                        await self._follow_one(channel)
                    except grpc.aio.AioRpcError as error:
                        logger.debug("no worker there: %s", error.details())
                    await asyncio.sleep(RETRY_S)
        finally:
            ticker.cancel()
            self.display.done()

    async def _follow_one(self, channel: grpc.aio.Channel) -> None:
        """Until the worker goes away. Raises AioRpcError then."""
        from quire.proto import worker_pb2, worker_pb2_grpc

        self._began = time.monotonic()
        stub: Any = worker_pb2_grpc.WorkerStub(channel)  # one class for both kinds of channel
        async for update in stub.Watch(worker_pb2.WatchRequest(), wait_for_ready=True):
            kind = update.WhichOneof("update")
            if kind == "startup":
                self._state = update.startup
                self._show()
            elif kind == "model":
                self._state = None
                self.display.done()
                await self.on_ready(update.model.model)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._show()

    def _show(self) -> None:
        if self._state is not None:
            self.display.show(describe(self._state, time.monotonic() - self._began))


def describe(startup: worker_pb2.Startup, elapsed_s: float) -> str:
    """`load 64% 1.2/1.9 GB: model-00002.safetensors (3 s)`; the phase is the first word."""
    parts = [startup.phase or "start"]
    if startup.total:
        parts.append(f"{100 * startup.done // startup.total}%")
        if startup.unit == "bytes":
            unit, scale = ("GB", 1e9) if startup.total >= 1e9 else ("MB", 1e6)
            parts.append(f"{startup.done / scale:.1f}/{startup.total / scale:.1f} {unit}")
        else:
            parts.append(f"{startup.done}/{startup.total} {startup.unit}".rstrip())
    text = " ".join(parts) + (f": {startup.detail}" if startup.detail else "")
    return f"{text} ({elapsed_s:.0f} s)"
