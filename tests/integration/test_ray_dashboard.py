"""The link to Ray's dashboard. Slow; needs root, and `ray[default]`, which nothing else does."""

from __future__ import annotations

import urllib.request
from importlib.util import find_spec

import pytest
from ray_fleet import Fleet, fleet_file, pool, started
from ray_hosts import can_make_namespaces, hosts, quire

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces"),
    pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="needs ray[default]"),
]


def test_status_shows_the_link_of_a_head_with_a_dashboard(tmp_path):
    content = fleet_file(pool("both", 1, node_label=""))
    with hosts("head", "ctl", base=tmp_path / "hosts") as made:
        fleet = Fleet(made, content, {})
        head = made["head"]
        flags = ("--include-dashboard=true", "--dashboard-host=0.0.0.0")
        started(head, lambda: head.start_head(*flags))()
        fleet.start_raylets(ctl=1)
        fleet.up()
        fleet.wait_ready("both-0")
        shown = quire(made["ctl"], "status").splitlines()
        [link] = [line.split()[-1] for line in shown if line.startswith("ray dashboard: ")]
        assert link == f"http://{head.address}:8265"
        with urllib.request.urlopen(link, timeout=30) as answer:
            assert b"Ray Dashboard" in answer.read()
