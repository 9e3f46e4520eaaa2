"""A replica of two ranks on two hosts of a Ray cluster, beside one whose ranks share a host; then
another model's, of four ranks on two hosts.

Slow, needs root: `pytest -m slow -s tests/integration/test_ray_rank_hosts.py`
prints times to recover. One cluster in the order below.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import pytest
from http_load import Load
from kept_figures import show
from parallel_models import SHARED
from ray_fleet import ENGINE, fleet_file, gateway, pool, report, running_fleet
from ray_hosts import can_make_namespaces, ray, resident_bytes
from server import running_server
from tiny_models import TINY, build
from waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces"),
]

IDS = [tiny.name for tiny in TINY]
RANK, NODE = "parallel.rank", "quire worker --config"


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory):
    """A model that four ranks can share; with the words of the demo model's."""
    folder = tmp_path_factory.mktemp("model")
    tiny = SHARED[IDS.index("llama-gqa3")]
    build(replace(tiny, config=tiny.config | {"vocab_size": 8192}), folder)
    return folder


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, four_heads):
    engine = {"tensor_parallel_size": 2, "dtype": "float32"}
    content = fleet_file(pool("wide", 1, cpus=2), pool("whole", 0, cpus=2), engine=engine)
    # found too small once the ranks have loaded, on whichever hosts they are
    small = {"engine": {"kv_cache_memory_bytes": 4096}, "node_label": "quire.pool=four"}
    refused = pool("small", 0, cpus=4, **small)
    four = {"model": "/tmp/model", "tensor_parallel_size": 4, "dtype": "float32"}
    pools = [pool("four", 0, cpus=4), refused]
    content["models"].append({"name": "four", "engine": ENGINE | four, "pools": pools})
    base = tmp_path_factory.mktemp("hosts")

    def copy_model(hosts) -> None:
        for host in hosts.values():
            shutil.copytree(four_heads, host.folder / "model")

    cpus = {"wide1": 1, "wide2": 1, "whole1": 2, "four1": 2, "four2": 2}
    with running_fleet(base, content, before=copy_model, **cpus) as fleet:
        show("coordinator and one replica of two hosts", ready_after_s=fleet.wait_ready("wide-0"))
        yield fleet


@pytest.fixture(scope="module")
def url(fleet):
    with gateway(fleet.address, "--fleet-model", "demo") as url:
        yield url


@pytest.fixture
def both(fleet):
    """The replica whose ranks share a host serves too."""
    fleet.ask("scale", {"whole": 1})
    fleet.wait_ready("wide-0", "whole-0")
    return fleet


def hosts_of(fleet) -> tuple:
    """(that of rank 0, that of rank 1) of wide-0."""
    address = fleet.pods()["wide-0"].host
    wide = [host for name, host in fleet.hosts.items() if name.startswith("wide")]
    return tuple(sorted(wide, key=lambda host: host.address != address))


def test_a_rank_runs_on_each_host_and_tokens_are_those_of_one_process(fleet, url) -> None:
    first, second = hosts_of(fleet)
    pod = fleet.pods()["wide-0"]
    assert pod.pid in first.pids(NODE)
    assert first.pids(RANK) == []
    [rank] = second.pids(RANK)
    for name, pid in (("rank 0", pod.pid), ("rank 1", rank)):
        show(name, memory_mb=resident_bytes(pid) / 1e6)
    show("both hosts", start_s=pod.startup_s, memory_mb=pod.resident_bytes / 1e6)
    assert pod.resident_bytes > resident_bytes(pod.pid) + resident_bytes(rank)
    with running_server("--dtype", "float32", "--max-model-len", "512") as server:
        one = Load(f"http://127.0.0.1:{server.port}")
        for seed in range(5):
            assert Load(url).stream(seed) == one.stream(seed)


def test_a_killed_rank_of_another_host_costs_no_request(both, url) -> None:
    _, second = hosts_of(both)
    before = both.pods()["wide-0"]
    with Load(url) as load:
        [rank] = second.kill(RANK)
        wait_until(lambda: both.pods()["wide-0"].restarts > before.restarts, "death noticed", 60)
        took = both.wait_ready("wide-0")
        finished = load.finished
        wait_until(lambda: load.finished > finished + 3, "more answers", 60)
    assert second.pids(RANK) != [rank]
    assert both.pods()["wide-0"].address == before.address
    assert load.failures == []
    report("rank of another host killed", took, load)


def test_a_killed_raylet_of_the_other_host_disturbs_nothing(both, url) -> None:
    _, second = hosts_of(both)
    before, [rank] = both.pods()["wide-0"], second.pids(RANK)
    with Load(url) as load:
        began = time.monotonic()
        assert second.kill("raylet/raylet")
        finished = load.finished
        wait_until(lambda: load.finished > finished + 10, "answers without the raylet", 90)
        second.kill("ray start")
        both.start_raylets(**{second.name: 1})
        wait_until(lambda: second.pids("CompanionActor"), "its supervisor started again", 120)
        took = time.monotonic() - began
        finished = load.finished
        wait_until(lambda: load.finished > finished + 3, "more answers", 60)
    after = both.pods()["wide-0"]
    assert second.pids(RANK) == [rank]
    assert (after.pid, after.restarts, after.state) == (before.pid, before.restarts, "ready")
    assert load.failures == []
    report("raylet of the other host killed, started again, its ranks adopted", took, load)


@pytest.mark.parametrize("number", [1, 0], ids=["of rank 1", "of rank 0"])
def test_a_lost_host_costs_no_request(both, url, number) -> None:
    lost = hosts_of(both)[number]
    with Load(url) as load:
        began = time.monotonic()
        lost.kill("")
        finished = load.finished
        wait_until(lambda: load.finished > finished + 5, "answers without it", 90)
        wait_until(lambda: both.pods()["wide-0"].state != "ready", "loss noticed", 60)
        both.start_raylets(**{lost.name: 1})
        both.wait_ready("wide-0", "whole-0")
        took = time.monotonic() - began
        finished = load.finished
        wait_until(lambda: load.finished > finished + 3, "more answers", 60)
    assert lost.pids(RANK) or hosts_of(both)[0] is lost
    assert load.failures == []
    report(f"all of the host of rank {number} killed, its raylet started again", took, load)


def test_four_ranks_on_two_hosts_give_the_tokens_of_one_process(fleet, four_heads) -> None:
    fleet.ask("scale", {"wide": 0, "whole": 0, "four": 1})
    show("four ranks on two hosts", ready_after_s=fleet.wait_ready("four-0"))
    pod = fleet.pods()["four-0"]
    pair = [host for name, host in fleet.hosts.items() if name.startswith("four")]
    assert sorted(len(host.pids(RANK)) for host in pair) == [1, 2]
    show("both hosts", start_s=pod.startup_s, memory_mb=pod.resident_bytes / 1e6)
    named = ("--served-model-name", "demo", "--tokenizer", "demo")
    alone = ("--dtype", "float32", "--max-model-len", "512", *named)
    with (
        gateway(fleet.address, "--fleet-model", "four", *named) as url,
        running_server(str(four_heads), *alone) as server,
    ):
        one = Load(f"http://127.0.0.1:{server.port}")
        texts = [one.stream(seed) for seed in range(5)]
        assert len(set(texts)) == 5
        assert [Load(url).stream(seed) for seed in range(5)] == texts


def test_a_refused_replica_holds_no_place_on_any_host(fleet) -> None:
    fleet.ask("scale", {"four": 0, "wide": 0, "whole": 0, "small": 1})
    wait_until(lambda: has_places(fleet), "it is placed", 60)
    wait_until(lambda: fleet.pods()["small-0"].state == "refused", "it is refused", 120)
    pod = fleet.pods()["small-0"]
    assert "--kv-cache-memory-bytes" in pod.reason
    assert (pod.pid, pod.address, pod.restarts) == (0, "", 0)
    wait_until(lambda: not has_places(fleet), "its places are given back", 60)
    assert [host.pids("quire-0/test/small") for host in fleet.hosts.values()] == [[]] * 7
    print(f"refused: {pod.reason}")


def has_places(fleet) -> bool:
    """Ray keeps resources for a replica."""
    status = ray(fleet.hosts["ctl"], "status")
    assert "CPU" in status, status
    return "reserved in placement groups" in status
