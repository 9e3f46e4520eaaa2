"""A fleet on a Ray cluster of several hosts, and what it does when parts of it are killed.

Slow, needs root for network namespaces: `pytest -m slow -s tests/integration/test_ray_fleet.py`
prints start-up times, memory and times to recover, and keeps them where KEEP_FIGURES says. The
tests use one cluster in the order below.
"""

from __future__ import annotations

import time

import pytest
from http_load import Load
from kept_figures import show
from ray_fleet import (
    fleet_file,
    gateway,
    head_found_again,
    keep_head_away,
    pool,
    report,
    running_fleet,
)
from ray_hosts import HEAD, can_make_namespaces, quire
from waiting import wait_until

from quire.coordinator.client import CoordinatorError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces"),
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    content = fleet_file(pool("prefill", 1), pool("decode", 2))
    base = tmp_path_factory.mktemp("hosts")
    with running_fleet(base, content, spare="decode3", prefill1=1, decode1=1, decode2=1) as fleet:
        took = fleet.wait_ready("prefill-0", "decode-0", "decode-1")
        show("coordinator and 3 replicas", ready_after_s=took)
        yield fleet


@pytest.fixture(scope="module")
def url(fleet):
    with gateway(fleet.address) as url:
        yield url


def test_replicas_are_where_their_pool_is(fleet):
    for name, pod in fleet.pods().items():
        host = next(h for h in fleet.hosts.values() if h.address == pod.host)
        assert host.name.rstrip("0123456789") == name.rpartition("-")[0]
        assert pod.address.startswith(host.address)
        assert pod.pid in host.pids("quire worker")
        assert pod.role == name.rpartition("-")[0]
        show(name, start_s=pod.startup_s, memory_mb=pod.resident_bytes / 1e6)
    fleet.show_processes()


def test_status_shows_where_everything_is(fleet):
    shown = quire(fleet.hosts["ctl"], "status").splitlines()
    assert shown[0].startswith("fleet test, epoch ")
    assert shown[1] == f"ray {HEAD}: answers"
    assert "pool decode: 2 of 2 ready, model demo" in shown
    rows = {line.split()[0]: line.split() for line in shown if " ready " in line[:40]}
    for name, pod in fleet.pods().items():
        role = name.rpartition("-")[0]
        assert rows[name][1:5] == ["ready", role, pod.address, str(pod.pid)]


def test_a_killed_engine_costs_no_request_and_comes_back(fleet, url):
    with Load(url) as load:
        before = fleet.pods()["decode-0"]
        host = next(h for h in fleet.hosts.values() if h.address == before.host)
        assert host.kill("/decode-0/options.json", "quire worker") == [before.pid]
        wait_until(lambda: fleet.pods()["decode-0"].restarts == 1, "the death noticed", 60)
        took = fleet.wait_ready("decode-0")
        finished = load.finished
        wait_until(lambda: load.finished > finished + 3, "more answers", 60)
    after = fleet.pods()["decode-0"]
    assert (after.address, after.restarts) == (before.address, 1)
    assert load.failures == []
    report("engine killed", took, load)


def test_engines_outlive_their_raylet_and_are_adopted(fleet, url):
    # nowhere else is room, so its supervisor waits for this host to come back
    before = fleet.pods()["decode-0"]
    host = next(h for h in fleet.hosts.values() if h.address == before.host)
    with Load(url) as load:
        began = time.monotonic()
        assert host.kill("raylet/raylet")
        wait_until(lambda: fleet.pods()["decode-0"].state == "unreachable", "loss noticed", 60)
        finished = load.finished
        wait_until(lambda: load.finished > finished + 3, "more answers", 60)
        assert before.pid in host.pids("quire worker")
        host.kill("ray start")
        fleet.start_raylets(**{host.name: 1})
        wait_until(lambda: fleet.pods()["decode-0"].adopted, "the adoption", 120)
        fleet.wait_ready("decode-0")
        took = time.monotonic() - began
    assert fleet.pods()["decode-0"].pid == before.pid
    assert load.failures == []
    report("raylet killed, started again, engine adopted", took, load)


def test_a_killed_coordinator_finds_everything_again(fleet, url):
    before, epoch = fleet.pods(), fleet.status().term
    with Load(url) as load:
        assert fleet.hosts["ctl"].kill("quire up")
        wait_until(lambda: fleet.status() is None, "its death", 30)
        finished = load.finished
        wait_until(lambda: load.finished > finished + 3, "answers without a coordinator", 60)
        fleet.up()
        took = fleet.wait_ready(*before)
    after = fleet.pods()
    assert {n: (p.pid, p.restarts) for n, p in after.items()} == {
        n: (p.pid, p.restarts) for n, p in before.items()
    }
    assert fleet.status().term > epoch
    assert load.failures == []
    report("coordinator killed", took, load)


def test_a_head_that_is_away_disturbs_no_stream(fleet, url):
    before, processes = fleet.pods(), fleet.ray_processes()
    with Load(url) as load:
        keep_head_away(fleet, load)
        with pytest.raises(CoordinatorError, match="head does not answer"):
            fleet.ask("scale", {"decode": 3})
        took = head_found_again(fleet)
        assert fleet.ray_processes() == processes
        assert {n: p.pid for n, p in fleet.pods().items()} == {n: p.pid for n, p in before.items()}
        assert "decode: 1 replicas" in quire(fleet.hosts["ctl"], "scale", "decode=1")
        wait_until(lambda: "decode-1" not in fleet.pods(), "one less", 90)
        assert "decode: 2 replicas" in quire(fleet.hosts["ctl"], "scale", "decode=2")
        fleet.wait_ready(*before)
    assert load.failures == []
    report("head started again, found by everybody", took, load)


def test_more_replicas_under_load_without_a_failed_request(fleet, url):
    fleet.start_raylets(decode3=2)
    with Load(url) as load:
        fleet.ask("scale", {"decode": 1})
        wait_until(lambda: "decode-1" not in fleet.pods(), "one less", 90)
        assert fleet.wait_ready("decode-0", timeout_s=10) < 10
        fleet.ask("scale", {"decode": 4})
        took = fleet.wait_ready(*(f"decode-{i}" for i in range(4)))
        finished = load.finished
        wait_until(lambda: load.finished > finished + 5, "more answers", 60)
    assert load.failures == []
    report("scaled from 1 to 4", took, load)


def test_a_pod_changes_its_role_without_a_restart(fleet, url):
    before = fleet.pods()["decode-3"]
    assert "decode-3: prefill" in quire(fleet.hosts["ctl"], "role", "decode-3", "prefill")
    wait_until(lambda: fleet.pods()["decode-3"].role == "prefill", "the role shown", 10)
    after = fleet.pods()["decode-3"]
    assert (after.role, after.pid, after.restarts) == ("prefill", before.pid, before.restarts)
    assert Load(url).stream(1)


def test_commands_say_which_pool_or_pod_there_is_not(fleet):
    ctl = fleet.hosts["ctl"]
    assert "no pool is called decod; there are prefill, decode" in quire(
        ctl, "scale", "decod=1", ok=False
    )
    said = quire(ctl, "role", "decode-9", "prefill", ok=False)
    assert "no pod is called decode-9; there are decode-0, " in said
    assert "not 'prefil'; did you mean prefill?" in quire(
        ctl, "role", "decode-0", "prefil", ok=False
    )


def test_more_than_there_is_room_for_is_refused(fleet):
    before = set(fleet.pods())
    said = quire(fleet.hosts["ctl"], "scale", "decode=9", ok=False)
    assert "pool decode: 9 replicas of 1 CPU are wanted, there is room for 4" in said
    assert "lower the number of replicas to 4" in said
    assert set(fleet.pods()) == before


def test_a_second_coordinator_is_refused(fleet):
    where = ("-P", "-m", "quire", "up", "-f", "/tmp/fleet.yaml")
    assert "uses /tmp/state" in quire(fleet.hosts["ctl"], *where[3:], ok=False)
    # from another host of the same cluster, whose state folder is its own
    other = fleet.hosts["decode2"]
    (other.folder / "fleet.yaml").write_text((fleet.hosts["ctl"].folder / "fleet.yaml").read_text())
    said = quire(other, *where[3:], ok=False)
    assert "another coordinator" in said
    assert "end that one first" in said
