"""What cannot be, said by `quire up` and `quire scale` on a real cluster, of which nothing is left.

Slow, needs root: `pytest -m slow tests/integration/test_ray_bad_inputs.py`. One cluster, whose
nodes announce GPUs that they do not have; each test leaves it empty.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys

import pytest
from ray_fleet import ENGINE, Fleet, fleet_file, pool, running_cluster
from ray_hosts import HEAD, can_make_namespaces, ended, placed, quire, write_fleet
from waiting import wait_until

from quire import demo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces"),
]

CANNOT_SERVE, FAILED = 2, 1
GPUS = 2
"""Of each node."""
ANY_NODE = {"node_label": ""}
ONLY_HERE = "/tmp/model"
"""A model that one node has."""
OTHER_RAY = """
import ray
ray.__version__ = "2.59.0"
from quire.cli.main import main
raise SystemExit(main())
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    base = tmp_path_factory.mktemp("hosts")

    def prepare(hosts) -> None:
        for name in ("node1", "node2"):
            hosts[name].gpus = GPUS
        shutil.copytree(demo.path(), hosts["node1"].folder / "model")
        (hosts["ctl"].folder / "other_ray.py").write_text(OTHER_RAY)

    with running_cluster(base, fleet_file(), before=prepare, node1=2, node2=2) as cluster:
        yield cluster


def refused(cluster: Fleet, content: dict, *start: str) -> str:
    """What `quire up` says of a fleet of which it places nothing."""
    path = write_fleet(cluster.hosts["ctl"], content)
    start = start or (sys.executable, "-P", "-m", "quire")
    code, said = ended(cluster.hosts["ctl"], *start, "up", "-f", path)
    assert code == CANNOT_SERVE, said
    assert "Traceback" not in said
    nothing_is_left(cluster)
    [line] = [line for line in said.splitlines() if line.startswith("quire: error: ")]
    return line


def nothing_is_left(cluster: Fleet, *but: str) -> None:
    """No placement group, no actor and no engine but those of these pods."""
    assert placed(cluster.hosts["ctl"]) == sorted(2 * [f"quire/test/{pod}" for pod in but])
    pids = [pid for host in cluster.hosts.values() for pid in host.pids("/quire-0/test/")]
    kept = [pid for pod in but for h in cluster.hosts.values() for pid in h.pids(f"test/{pod}")]
    assert sorted(pids) == sorted(kept)


@contextlib.contextmanager
def up(cluster: Fleet, content: dict):
    """A fleet that runs, ended as by Ctrl-C."""
    cluster.content = content
    process = cluster.up()
    try:
        yield
    finally:
        process.send_signal(2)
        code = process.wait(90)
    assert code == 0
    nothing_is_left(cluster)


@contextlib.contextmanager
def taken(cluster: Fleet, port: int, *names: str):
    """Another program listens on a port of these hosts."""
    hosts = [cluster.hosts[name] for name in names]
    others = [host.start(sys.executable, "-P", "-m", "http.server", str(port)) for host in hosts]

    def is_taken(address: str) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex((address, port)) == 0

    try:
        wait_until(lambda: all(is_taken(host.address) for host in hosts), "the other program", 60)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait(10)


def gpu_pool(name: str, replicas: int, gpus: int = 1) -> dict:
    return pool(name, replicas, cpus=0.5, gpus=gpus, **ANY_NODE)


def test_more_gpus_than_there_are(cluster) -> None:
    said = refused(cluster, fleet_file(gpu_pool("both", 5)))
    assert "pool both: 5 replicas of 0.5 CPU and 1 GPU are wanted, there is room for 4" in said
    assert "2 CPU and 2 GPU" in said
    assert "lower the number of replicas to 4, or add nodes" in said
    said = refused(cluster, fleet_file(gpu_pool("both", 1, gpus=8)))
    assert "1 replicas of 0.5 CPU and 8 GPU are wanted, there is room for 0" in said


def test_scaling_beyond_the_gpus_leaves_what_runs_alone(cluster) -> None:
    with up(cluster, fleet_file(gpu_pool("both", 1))):
        cluster.wait_ready("both-0")
        before = cluster.pods()["both-0"]
        said = quire(cluster.hosts["ctl"], "scale", "both=5", ok=False)
        assert "there is room for 4" in said
        assert {n: pod.pid for n, pod in cluster.pods().items()} == {"both-0": before.pid}
        nothing_is_left(cluster, "both-0")


def test_a_label_that_no_node_has(cluster) -> None:
    said = refused(cluster, fleet_file(pool("both", 1)))
    assert "pool both: no node is labelled quire.pool=both" in said
    assert "ray start --labels" in said


def test_a_model_that_one_node_does_not_have(cluster) -> None:
    lacking = cluster.hosts["node2"].address
    content = fleet_file(pool("both", 1, **ANY_NODE), engine={"model": ONLY_HERE})
    said = refused(cluster, content)
    assert f"{ONLY_HERE} is not on node {lacking}" in said
    assert "keep pool both off that node with node-label" in said


def test_scaling_a_model_that_one_node_does_not_have(cluster) -> None:
    content = fleet_file(pool("both", 1, **ANY_NODE))
    lacking = {"name": "other", "engine": ENGINE | {"model": ONLY_HERE}}
    content["models"].append(lacking | {"pools": [pool("other", 0, **ANY_NODE)]})
    with up(cluster, content):
        cluster.wait_ready("both-0")
        code, said = ended(
            cluster.hosts["ctl"], sys.executable, "-P", "-m", "quire", "scale", "other=1"
        )
        assert code == FAILED
        assert f"{ONLY_HERE} is not on node {cluster.hosts['node2'].address}" in said
        nothing_is_left(cluster, "both-0")


def test_another_version_of_ray(cluster) -> None:
    script = (sys.executable, "-P", "/tmp/other_ray.py")
    said = refused(cluster, fleet_file(pool("both", 1, **ANY_NODE)), *script)
    assert f"Ray at {HEAD} is of another version than here (ray 2.59.0)" in said
    assert "install the same ray and Python on every node" in said


def test_the_coordinators_port_is_taken(cluster) -> None:
    with taken(cluster, 9200, "ctl"):
        said = refused(cluster, fleet_file(pool("both", 1, **ANY_NODE)))
    assert "0.0.0.0:9200" in said
    assert "give the coordinator another --listen address" in said


def test_an_engines_port_is_taken(cluster) -> None:
    with (
        taken(cluster, 9300, "node1", "node2"),
        up(cluster, fleet_file(pool("both", 1, port=9300, **ANY_NODE))),
    ):
        wait_until(lambda: says_failed(cluster), "the failure shown", 120)
        shown = quire(cluster.hosts["ctl"], "status")
        host = cluster.pods()["both-0"].host
        assert f"port 9300 of {host} cannot be listened on (Address already in use)" in shown
        assert "give the pool another port, or 0 for any free one" in shown
        assert [h.pids("quire worker") for h in cluster.hosts.values()] == [[]] * 4


def test_an_engine_starts_once_its_port_is_free(cluster) -> None:
    with up(cluster, fleet_file(pool("both", 1, port=9300, **ANY_NODE))):
        with taken(cluster, 9300, "node1", "node2"):
            wait_until(lambda: says_failed(cluster), "the failure shown", 120)
        cluster.wait_ready("both-0")
        assert cluster.pods()["both-0"].address.endswith(":9300")


def says_failed(cluster: Fleet) -> bool:
    return any(pod.state == "failed" for pod in cluster.pods().values())
