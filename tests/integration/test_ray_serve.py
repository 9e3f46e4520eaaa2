"""`quire serve --ray`: workers on a Ray of the server's own, or of a cluster, which end with it.

Slow: `pytest -m slow tests/integration/test_ray_serve.py`. Those on a cluster need root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from http_load import Load
from ray_fleet import START_S, running_cluster
from ray_hosts import BIN, HEAD, can_make_namespaces, placed
from server import running_server
from waiting import wait_until

from quire import demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
FLAGS = ("--ray", "--replicas", "2", "--num-threads", "1", "--kv-cache-memory-bytes", "32M")
BODY = {"model": "demo", "prompt": "import os\ndef ", "max_tokens": 40, "seed": 3}


def processes(*words: str) -> list[int]:
    """Of this machine, whose command line has all these words."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [int(entry.name)] * all(word in line for word in words)
    return found


def test_a_killed_coordinator_is_not_noticed_and_everything_ends_with_the_server():
    with running_server(*FLAGS, "--max-model-len", "512") as server:
        fleet = f"/serve-{server.port}/"
        wait_until(lambda: server.metric("quire_gateway_worker_up") == 2)
        engines = processes("quire worker", fleet)
        assert len(engines) == 2
        own = os.getpriority(os.PRIO_PROCESS, server.process.pid)
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in engines} == {own}
        want = server.post("/v1/completions", BODY)["choices"][0]["text"]

        def coordinator() -> list[int]:
            return [pid for pid in server.pids() if pid in processes("quire.coordinator")]

        [before] = coordinator()
        os.kill(before, signal.SIGKILL)
        for _ in range(20):
            assert server.post("/v1/completions", BODY)["choices"][0]["text"] == want
        wait_until(lambda: coordinator() not in ([], [before]))
        wait_until(lambda: len(processes("quire.coordinator.keeper", fleet)) == 2)
        assert processes("quire worker", fleet) == engines
        assert server.post("/v1/completions", BODY)["choices"][0]["text"] == want
    wait_until(lambda: not processes("quire worker", fleet), "they end", 60)


MODEL = "/tmp/model"
SERVE = (
    f"{sys.executable} -P -m quire serve {MODEL} --host 0.0.0.0 --port 8000 --api-key k "
    "--served-model-name demo --replicas 2 --num-threads 1 "
    "--kv-cache-memory-bytes 32M --max-model-len 512"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    def copy_model(hosts) -> None:
        for host in hosts.values():
            shutil.copytree(demo.path(), host.folder / "model")

    base = tmp_path_factory.mktemp("hosts")
    with running_cluster(base, {}, spare="here", before=copy_model, node1=1, node2=1) as cluster:
        yield cluster


def serve_on(host, ray: str):
    """A server on a node that holds no replica. It sees no other host's processes, among which
    `auto` would find their Ray."""
    node = (
        f"{BIN}/ray start --address={HEAD} --node-ip-address={host.address} --num-cpus=0 "
        "--num-gpus=0 --object-store-memory=80000000 --include-log-monitor=false"
    )
    (host.folder / "serve.sh").write_text(f"{node} && exec {SERVE} --ray {ray}\n")
    return host.start("sh", "/tmp/serve.sh", alone=True)


@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces")
@pytest.mark.parametrize("ray", ["auto", HEAD])
def test_a_server_on_a_node_of_a_cluster(cluster, ray):
    here, nodes = cluster.hosts["here"], [cluster.hosts["node1"], cluster.hosts["node2"]]
    process = serve_on(here, ray)
    url = f"http://{here.address}:8000"
    wait_until(lambda: process.poll() is not None or is_up(url), "the server", START_S)
    with Load(url, key="k") as load:
        # one on each node, which are full with it
        assert [len(host.pids("quire worker --config")) for host in nodes] == [1, 1]
        pods = ["quire/serve-8000/both-0", "quire/serve-8000/both-1"]
        assert placed(here) == sorted(2 * pods)
        wait_until(lambda: load.finished > 10, "answers", 60)
    assert load.failures == []
    for pid in here.pids("quire serve", "--port"):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) == 0
    assert placed(nodes[0]) == []
    assert [host.pids("quire worker") for host in nodes] == [[], []]


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/readyz", timeout=5):
            return True
    except OSError:
        return False


def test_a_server_whose_replicas_are_all_refused_ends_with_the_reason():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = ["--ray", "--port", str(port), "--num-threads", "1", "--kv-cache-memory-bytes", "4096"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "quire", "serve", *flags],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("quire: error: ")]
    assert "is refused: " in said
    assert "--kv-cache-memory-bytes" in said
    assert processes(f"/serve-{port}/") == []
