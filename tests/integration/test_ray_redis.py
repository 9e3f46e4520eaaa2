"""Ray's head killed and started again, its state in Redis. Slow; needs root and redis-server."""

from __future__ import annotations

import shutil

import pytest
from http_load import Load
from ray_fleet import (
    fleet_file,
    gateway,
    head_found_again,
    keep_head_away,
    pool,
    report,
    running_fleet,
)
from ray_hosts import can_make_namespaces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]
REDIS = {"RAY_REDIS_ADDRESS": "10.91.7.2:6379"}


def test_the_fleet_is_found_again_by_a_head_with_redis(tmp_path):
    content = fleet_file(pool("both", 1))

    def start_redis(hosts) -> None:
        hosts["ctl"].start("redis-server", "--protected-mode", "no", "--save", "''")

    with running_fleet(tmp_path / "h", content, REDIS, before=start_redis, both1=2) as fleet:
        fleet.wait_ready("both-0")
        before = fleet.pods()["both-0"]
        with gateway(fleet.address) as url, Load(url, num_clients=2) as load:
            processes = fleet.ray_processes()
            keep_head_away(fleet, load)
            took = head_found_again(fleet)
            assert fleet.ray_processes() == processes
            fleet.ask("scale", {"both": 2})
            fleet.wait_ready("both-0", "both-1")
        assert load.failures == []
        assert fleet.pods()["both-0"].pid == before.pid
        report("head with its state in Redis started again, found by everybody", took, load)
