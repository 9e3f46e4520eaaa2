"""Ray's head killed and started again, its state in Redis. Slow; needs root and redis-server."""

from __future__ import annotations

import shutil
import time

import pytest
from http_load import Load
from ray_fleet import fleet_file, gateway, pool, running_fleet
from ray_hosts import can_make_namespaces
from waiting import wait_until

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
        with gateway(fleet.address) as url, Load(url, num_clients=1) as load:
            head = fleet.hosts["head"].processes[-1]
            head.kill()
            head.wait(10)
            wait_until(lambda: fleet.status().ray_problem, "its death noticed", 60)
            began = time.monotonic()
            fleet.start_head()
            wait_until(lambda: not fleet.status().ray_problem, "the head found again", 120)
            took = time.monotonic() - began
            fleet.ask("scale", {"both": 2})
            fleet.wait_ready("both-0", "both-1")
        assert load.failures == []
        assert fleet.pods()["both-0"].pid == before.pid
        print(f"head found again {took:.1f} s after its start; {load.finished} answers, 0 failed")
