"""Another host's part of a replica: starts its ranks when rank 0 says so, and ends with them.

    connect, again and again ─▶ greeted ─START─▶ ranks run ─▶ one ends, or rank 0 ─▶ all end, exit
                                └──── shows rank 0 that it lives ────┘

The ranks themselves talk to rank 0; this process tells how one ended, and ends those that hang. It
ends with the gang, as rank 0's process does: whoever supervises either starts it again, and they
find each other anew. Imports neither torch nor gRPC.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.cluster.tls import tls_context
from quire.config.base import from_mapping
from quire.config.engine import EngineConfig
from quire.config.exit_codes import CANNOT_SERVE
from quire.engine.parallel import greeting
from quire.engine.parallel.channel import BEAT_S, Channel, Kind
from quire.engine.parallel.processes import RankOptions, RankProcess

if TYPE_CHECKING:
    from quire.engine.parallel.spread import Spread

logger = logging.getLogger(__name__)

CONNECT_S, RETRY_S, REMIND_S = 5.0, 0.5, 30.0
WATCH_S = 0.1
ENDED, LOST = 0, 1
"""Exit codes beside CANNOT_SERVE: rank 0 or a signal ended it, a rank was lost."""


@dataclass
class Stopping:
    """A signal has come: while nothing runs here it ends this process at once; what runs goes on
    until rank 0 has drained, which it does on a signal of its own, or time is up."""

    grace_s: float
    deadline: float = float("inf")

    def __post_init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.deadline = min(self.deadline, time.monotonic() + self.grace_s)

    @property
    def is_asked(self) -> bool:
        """It has come."""
        return self.deadline < float("inf")

    @property
    def is_late(self) -> bool:
        """Time is up."""
        return time.monotonic() > self.deadline


def run(spread: Spread, number: int, grace_s: float) -> int:
    """Host `number`'s part, until rank 0 ends it or a rank is lost; returns the exit code.

    `grace_s`: for rank 0 to drain after this process was told to end.
    """
    stopping = Stopping(grace_s)
    try:
        met = _meet(spread, number, stopping)
        if met is None:
            return ENDED
        channel, secret = met
        threading.Thread(target=_show_life, args=(channel,), name="beat", daemon=True).start()
        order = channel.receive_json(Kind.START, max_bytes=1 << 20)
        ranks = _start(order, spread, number, secret)
    except (greeting.Refused, ValueError, TypeError, LookupError) as error:
        print(f"quire: error: rank 0 at {spread.host}: {error}", file=sys.stderr, flush=True)
        return CANNOT_SERVE
    except (OSError, EOFError) as error:
        logger.error("rank 0 at %s is gone: %s", spread.host, error)
        return LOST
    try:
        return _watch(channel, ranks, stopping)
    finally:
        for process in ranks.values():
            process.kill()
        for process in ranks.values():
            process.end()
        channel.close()


def _meet(spread: Spread, number: int, stopping: Stopping) -> tuple[Channel, str] | None:
    """A connection to rank 0, which may come up later, and the ranks' secret; None when told to
    end. Raises Refused, OSError."""
    tls = tls_context(spread.cluster, server=False)
    reminded = float("-inf")
    while not stopping.is_asked:
        try:
            sock = socket.create_connection((spread.host, spread.port), CONNECT_S)
            channel = Channel.over(sock, tls, is_dialler=True)
            return channel, _introduce(channel, spread.cluster.cluster_token or "", number)
        except (OSError, EOFError, ValueError) as error:
            if time.monotonic() - reminded > REMIND_S:
                reminded = time.monotonic()
                where = f"{spread.host}:{spread.port}"
                logger.warning("host %d waits for rank 0 at %s: %s", number, where, error)
        time.sleep(RETRY_S)
    return None


def _introduce(channel: Channel, token: str, number: int) -> str:
    try:
        return greeting.introduce(channel, token, node=number)
    except BaseException:
        channel.close()
        raise


def _start(
    order: dict[str, Any], spread: Spread, number: int, secret: str
) -> dict[int, RankProcess]:
    """The ranks that rank 0 wants here. Raises ValueError, TypeError or LookupError."""
    engine = from_mapping(EngineConfig, order["engine"])
    ranks = [int(rank) for rank in order["ranks"]]
    return {
        rank: RankProcess(
            RankOptions(
                engine=engine,
                rank=rank,
                world_size=int(order["world_size"]),
                local_rank=local_rank,
                local_size=len(ranks),
                node=number,
                master=(spread.host, spread.port),
                secret=secret,
                fingerprint=str(order["fingerprint"]),
                known_as=spread.known_as,
                cluster=spread.cluster,
                log_level=str(order["log_level"]),
            )
        )
        for local_rank, rank in enumerate(ranks)
    }


def _watch(channel: Channel, ranks: dict[int, RankProcess], stopping: Stopping) -> int:
    """Until one of them, or rank 0, has ended; returns the exit code."""
    while not channel.is_over(WATCH_S):
        for rank, process in ranks.items():
            if not process.is_alive:
                how = process.how_it_died()
                logger.error("rank %d %s", rank, how)
                with contextlib.suppress(OSError):
                    channel.send_json(Kind.ENDED, {"rank": rank, "how": how})
                return LOST
        if stopping.is_late:
            return ENDED
    return ENDED


def _show_life(channel: Channel) -> None:
    with contextlib.suppress(OSError):
        while not channel.is_over(BEAT_S):
            channel.send(Kind.BEAT)
