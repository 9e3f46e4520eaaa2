"""Measures a link: round trips of empty frames, then frames of 1 MiB that are thrown away."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.transfer.frames import Header, Kind, pack
from quire.transfer.layout import FRAME_BYTES
from quire.transfer.link import LinkRefused, Outgoing
from quire.transfer.state import Failure

if TYPE_CHECKING:
    from quire.transfer.sending_link import SendingLink

ROUND_TRIPS = 50
TIMEOUT_S = 10.0
MAX_BYTES = 256 << 20
"""A probe takes bandwidth from transfers: not for long."""


@dataclass(frozen=True)
class Measurement:
    """One transport from here to a peer."""

    bytes_per_s: float
    latency_p50_s: float
    """There and back, of an empty frame."""
    latency_p99_s: float


async def measure(link: SendingLink, num_bytes: int) -> Measurement:
    """Use a link for nothing else; it is closed in the end.

    Raises LinkRefused when it breaks or takes longer than TIMEOUT_S.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await _round_trip(link, 0)  # wires up what connects with the first use
            trips = sorted([await _timed(link, 0) for _ in range(ROUND_TRIPS)])
            count = max(min(num_bytes, MAX_BYTES) // FRAME_BYTES, 1)
            start = time.perf_counter()
            await asyncio.gather(*(_round_trip(link, FRAME_BYTES) for _ in range(count)))
            rate = count * FRAME_BYTES / (time.perf_counter() - start)
    except TimeoutError:
        raise LinkRefused(Failure.LOST, f"not measured within {TIMEOUT_S:g} s") from None
    except asyncio.CancelledError:
        if link.is_ready:
            raise
        raise LinkRefused(Failure.LOST, link.why) from None
    finally:
        link.close("probed")
    return Measurement(rate, trips[ROUND_TRIPS // 2], trips[ROUND_TRIPS * 99 // 100])


async def _timed(link: SendingLink, length: int) -> float:
    start = time.perf_counter()
    await _round_trip(link, length)
    return time.perf_counter() - start


async def _round_trip(link: SendingLink, length: int) -> None:
    sequence = link.next_sequence()
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    link.probes[sequence] = future
    head = pack(Header(Kind.PROBE, length=length, sequence=sequence))
    view = link.node.memory.probe_bytes(length)
    link.put(Outgoing(head, (view,) if length else ()))
    await future
