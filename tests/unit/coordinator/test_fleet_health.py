"""What Ray Serve is told of a fleet; tests/deploy/test_rayservice.py shows what it makes of it."""

from __future__ import annotations

import pytest

from quire.coordinator.fleet_health import why_not_complete, why_not_serving
from quire.proto.coordinator_pb2 import FleetStatus


def fleet(**pools: tuple[int, int]) -> FleetStatus:
    """Pool -> (ready, wanted)."""
    status = FleetStatus()
    for name, (ready, wanted) in pools.items():
        status.pools.add(pool=name, ready=ready, wanted=wanted)
    return status


@pytest.mark.parametrize(
    ("status", "incomplete", "silent"),
    [
        (fleet(), "the fleet has no pools yet", "the fleet has no pools yet"),
        (fleet(a=(0, 1)), "pool a: 0 of 1 ready", "pool a: 0 of 1 ready"),
        (fleet(a=(1, 1)), "", ""),
        (fleet(a=(2, 1)), "", ""),
        (fleet(a=(1, 2)), "pool a: 1 of 2 ready", ""),
        (fleet(a=(1, 2), b=(0, 3)), "pool a: 1 of 2 ready; pool b: 0 of 3 ready",
         "pool b: 0 of 3 ready"),
        (fleet(a=(1, 1), b=(0, 0)), "", ""),
    ],
)  # fmt: skip
def test_clients_are_sent_to_a_whole_fleet_and_stay_while_it_serves(
    status, incomplete, silent
) -> None:
    assert why_not_complete(status) == incomplete
    assert why_not_serving(status) == silent
