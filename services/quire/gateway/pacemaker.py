"""Keeps silent streams open: one timer for all of them instead of one each."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.gateway.replies import Replies


class Paced(Protocol):
    """A stream that may have fallen silent."""

    last_sent: float
    """time.monotonic() of the last bytes written."""


class Pacemaker:
    """Nudges streams that have been silent for `interval_s`; 0 for never. `run` must be running."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._streams: dict[Replies, Paced] = {}

    @contextmanager
    def follow(self, replies: Replies, stream: Paced) -> Iterator[None]:
        """Watch over a stream while it is open."""
        self._streams[replies] = stream
        try:
            yield
        finally:
            del self._streams[replies]

    async def run(self) -> None:
        """Until cancelled."""
        if not self._interval_s:
            return
        while True:
            await asyncio.sleep(min(1.0, self._interval_s / 4))
            self._beat()

    def _beat(self) -> None:
        # a function, so that its last stream is let go of while `run` sleeps
        silent_since = time.monotonic() - self._interval_s
        for replies, stream in list(self._streams.items()):
            if stream.last_sent <= silent_since:
                replies.nudge()
