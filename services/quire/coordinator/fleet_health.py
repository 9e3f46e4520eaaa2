"""Whether clients may be sent to a fleet, and whether they get answers there. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.proto.coordinator_pb2 import FleetStatus, PoolStatus


class NotServing(Exception):
    """Of a fleet; says what is missing."""


def why_not_complete(status: FleetStatus) -> str:
    """What is missing before clients may be sent here, empty when nothing is."""
    return _listed(status, [pool for pool in status.pools if pool.ready < pool.wanted])


def why_not_serving(status: FleetStatus) -> str:
    """Why clients get no answers, empty when they do. A pool may lack some pods."""
    return _listed(status, [pool for pool in status.pools if pool.wanted and not pool.ready])


def _listed(status: FleetStatus, short: Iterable[PoolStatus]) -> str:
    if not status.pools:
        return "the fleet has no pools yet"
    return "; ".join(f"pool {p.pool}: {p.ready} of {p.wanted} ready" for p in short)
