"""The other ranks, and the hosts they run on, as rank 0 knows them."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.engine.parallel.channel import Kind
from quire.engine.parallel.processes import END_S
from quire.engine.parallel.vitals import Vitals

if TYPE_CHECKING:
    from quire.engine.parallel.channel import Channel
    from quire.engine.parallel.processes import RankProcess


@dataclass
class Node:
    """Another host's process, which started its ranks and knows how they ended."""

    number: int
    secret: str = ""
    """That its ranks prove themselves with."""
    channel: Channel | None = None
    met: float = 0.0
    """When it connected."""
    heard: float = 0.0
    ends: dict[int, str] = field(default_factory=dict)
    """Rank -> how it ended."""

    @property
    def host(self) -> str:
        """Its address."""
        return self.channel.peer if self.channel is not None else ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"host {self.number}" + (f" ({self.host})" if self.host else "")

    def how_it_died(self) -> str:
        """One clause for the error message."""
        return "closed its connection"

    def hear(self) -> None:
        """Take in what has arrived of it. Raises OSError, EOFError, ValueError."""
        assert self.channel is not None
        while self.channel.has_arrived:
            kind, payload = self.channel.receive()
            self.heard = time.monotonic()
            if kind is Kind.ENDED:
                self.note_end(payload)

    def note_end(self, payload: bytes) -> None:
        """It said how a rank ended. Raises ValueError."""
        assert self.channel is not None
        told = self.channel.parse(Kind.ENDED, payload, Kind.ENDED)
        self.ends[int(told["rank"])] = str(told["how"])[:200]

    def end_of(self, rank: int) -> str | None:
        """How a rank ended, once the host says so, None when it does not in time.

        For the thread that listens to it, when nothing else of it matters any more.
        """
        deadline = time.monotonic() + END_S
        if self.channel is None:
            return None
        with contextlib.suppress(OSError, EOFError, ValueError):
            while rank not in self.ends and (left := deadline - time.monotonic()) > 0:
                self.channel.set_timeout(left)
                kind, payload = self.channel.receive()
                if kind is Kind.ENDED:
                    self.note_end(payload)
        return self.ends.get(rank)


@dataclass
class Member:
    """Another rank: where it runs, its connection, and when it was last heard."""

    rank: int
    process: RankProcess | None = None
    """Where it runs on this host."""
    node: Node | None = None
    """Where it does not."""
    channel: Channel | None = None
    heard: float = 0.0
    pid: int = 0
    vitals: Vitals = field(default_factory=Vitals)
    """That it has told last."""

    @property
    def name(self) -> str:
        """For messages."""
        where = "" if self.node is None else f" on {self.node.host}"
        return f"rank {self.rank}" + (f" (pid {self.pid}{where})" if self.pid else "")

    @property
    def has_ended(self) -> bool:
        """As far as is known."""
        if self.process is not None:
            return not self.process.is_alive
        return self.node is not None and self.rank in self.node.ends

    def kill(self) -> None:
        """End it now; on another host the end of the connections does it."""
        if self.process is not None:
            self.process.kill()

    def end(self) -> None:
        """Wait for the end of a process of this host."""
        if self.process is not None:
            self.process.end()

    def how_it_died(self) -> str:
        """One clause for the error message."""
        if self.process is not None:
            return self.process.how_it_died()
        assert self.node is not None
        return self.node.end_of(self.rank) or "closed its connection"
