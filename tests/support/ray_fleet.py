"""A fleet on Ray hosts, with a gateway outside of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from http_load import BODY, Load
from kept_figures import show
from ray_hosts import (
    HEAD,
    TOKEN,
    Host,
    hosts,
    resident_bytes,
    write_fleet,
)
from waiting import wait_until

from quire.cluster.rpc import Cluster
from quire.config.cluster import ClusterConfig
from quire.coordinator.client import CoordinatorClient, CoordinatorError

if TYPE_CHECKING:
    from collections.abc import Callable

START_S = 240
ENGINE = {"max_model_len": 512, "num_threads": 1, "kv_cache_memory_bytes": "32M"}
PROCESSES = {
    "Ray's head (GCS)": ("gcs/gcs_server",),
    "Ray's head: autoscaler monitor": ("autoscaler/_private/monitor",),
    "Ray's head: process of the dashboard, without pages": ("dashboard/dashboard.py",),
    "Ray's head: server for remote clients": ("ray.util.client.server",),
    "raylet": ("raylet/raylet",),
    "Ray's dashboard agent": ("ray::DashboardAgent",),
    "Ray's runtime environment agent": ("ray::RuntimeEnvAgent",),
    "ray start": ("python", "bin/ray start"),
    "coordinator": ("quire up",),
    "supervisor": ("SupervisorActor",),
    "keeper": ("quire.coordinator.keeper",),
    "engine": ("quire worker --config",),
}
"""Kind -> what its command line has."""
AWAY_WINDOWS, WINDOW_S = 10, 10.0
"""A head stays away for this many windows. Without a longer time to reconnect Ray's processes end
after 60 s."""
ROCKSDB = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/tmp/gcs"}


def pool(name: str, replicas: int, **fields: object) -> dict:
    role = name if name in ("prefill", "decode") else "both"
    base = {"name": name, "role": role, "replicas": replicas, "cpus": 1}
    return base | {"node_label": f"quire.pool={name}"} | fields


def fleet_file(*pools: dict, engine: dict | None = None, **fields: object) -> dict:
    # patient transfers: the hosts share two cores with whatever else runs
    transfer = {"kv_heartbeat_s": 5.0, "kv_lease_s": 60.0}
    models = [{"name": "demo", "engine": ENGINE | (engine or {}), "pools": list(pools)}]
    return {
        "fleet": "test", "ray": HEAD, "listen": "0.0.0.0:9200", "state_dir": "/tmp/state",
        "models": models, "transfer": transfer,
    } | fields  # fmt: skip


@dataclass
class Fleet:
    """Running hosts and a coordinator on `ctl`."""

    hosts: dict[str, Host]
    content: dict
    storage: dict[str, str]

    @property
    def address(self) -> str:
        return f"{self.hosts['ctl'].address}:9200"

    def ask(self, method: str, *args: object):
        async def run():
            client = CoordinatorClient(self.address, Cluster(ClusterConfig(cluster_token=TOKEN)))
            return await getattr(client, method)(*args)

        return asyncio.run(run())

    def status(self):
        """None while nobody answers."""
        try:
            return self.ask("status")
        except CoordinatorError:
            return None

    def pods(self) -> dict:
        status = self.status()
        return {} if status is None else {pod.pod: pod for pod in status.pods}

    def wait_ready(self, *names: str, timeout_s: float = START_S) -> float:
        def ready() -> bool:
            pods = self.pods()
            states = {name: pods[name].state if name in pods else "" for name in names}
            return set(states.values()) == {"ready"}

        return wait_until(ready, f"{names} ready", timeout_s)

    def up(self) -> subprocess.Popen:
        path = write_fleet(self.hosts["ctl"], self.content)
        return self.hosts["ctl"].start(sys.executable, "-P", "-m", "quire", "up", "-f", path)

    def start_head(self) -> None:
        host = self.hosts["head"]
        wait = started(host, lambda: host.start_head(**self.storage))
        wait()

    def start_raylets(self, **cpus_by_host: int) -> None:
        waits = []
        for name, cpus in cpus_by_host.items():
            host = self.hosts[name]
            label = f"quire.pool={name.rstrip('0123456789')}" if cpus else ""
            waits.append(started(host, partial(host.start_raylet, cpus, label)))
        for wait in waits:
            wait()

    def ray_processes(self) -> dict[str, list[int]]:
        """Raylets and supervisors of every host but the head's."""
        hosts = [host for name, host in self.hosts.items() if name != "head"]
        return {h.name: sorted(h.pids("raylet/raylet") + h.pids("SupervisorActor")) for h in hosts}

    def show_processes(self) -> None:
        """The memory of each kind of process."""
        for kind, words in PROCESSES.items():
            pids = [pid for host in self.hosts.values() for pid in host.pids(*words)]
            sizes = [resident_bytes(pid) / 1e6 for pid in pids]
            if sizes:
                show(kind, processes=len(sizes), least_mb=min(sizes), most_mb=max(sizes))


def keep_head_away(fleet: Fleet, load: Load) -> None:
    """Kill it, and wait until Ray's processes would have ended that had not been told to wait.

    Streams go on: each client gets tokens in every window, and none waits for one while the others
    get several answers.
    """
    head = fleet.hosts["head"].processes[-1]
    head.kill()
    head.wait(10)
    wait_until(lambda: fleet.status().ray_problem, "its death noticed", 60)
    load.longest_gap_s, load.longest_wait = 0.0, 0
    for _ in range(AWAY_WINDOWS):
        before = dict(load.pieces)
        time.sleep(WINDOW_S)
        stalled = [client for client, got in before.items() if load.pieces[client] == got]
        assert not stalled, f"clients {stalled} got nothing for {WINDOW_S:g} s"
    assert load.longest_wait < 10 * BODY["max_tokens"]
    show(
        "a stream's longest gap while the head was away",
        away_s=AWAY_WINDOWS * WINDOW_S,
        gap_s=load.longest_gap_s,
        pieces_of_others=load.longest_wait,
    )


def head_found_again(fleet: Fleet) -> float:
    """Start the head; seconds until the coordinator has it back."""
    began = time.monotonic()
    fleet.start_head()
    wait_until(lambda: not fleet.status().ray_problem, "the head found again", 120)
    return time.monotonic() - began


def report(what: str, took_s: float, load: Load) -> None:
    """How long it took, and what became of the requests meanwhile."""
    show(what, took_s=took_s, answers=load.finished, failed=len(load.failures))


def started(host: Host, start: Callable[[], subprocess.Popen]) -> Callable[[], float]:
    """Start a part of Ray, and what waits for it.

    On a busy machine Ray gives its own processes too little time: a pod would be started again.
    """
    before = host.log().count("runtime started")
    process = [start()]

    def is_up() -> bool:
        if process[0].poll() is not None:
            print(f"Ray on {host.name} did not start; once more")
            process[0] = start()
        return host.log().count("runtime started") > before

    return lambda: wait_until(is_up, f"Ray on {host.name}", START_S)


@contextlib.contextmanager
def running_fleet(
    base,
    content: dict,
    storage: dict[str, str] | None = None,
    spare: str = "",
    before: Callable[[dict[str, Host]], None] = lambda _: None,
    **cpus: int,
):
    """A fleet on a `running_cluster`."""
    with running_cluster(base, content, storage, spare, before, **cpus) as fleet:
        fleet.up()
        yield fleet


@contextlib.contextmanager
def running_cluster(
    base,
    content: dict,
    storage: dict[str, str] | None = None,
    spare: str = "",
    before: Callable[[dict[str, Host]], None] = lambda _: None,
    **cpus: int,
):
    """Ray alone. `cpus`: of each host beside the head's and the coordinator's, whose name says the
    pool. `spare` is a host that has not joined yet; `before` runs before the head starts.
    """
    names = [*cpus, spare] if spare else [*cpus]
    with hosts("head", "ctl", *names, base=base) as made:
        fleet = Fleet(made, content, ROCKSDB if storage is None else storage)
        began = time.monotonic()
        before(made)
        fleet.start_head()
        fleet.start_raylets(ctl=0, **cpus)
        show("Ray", hosts=2 + len(cpus), started_in_s=time.monotonic() - began)
        try:
            yield fleet
        except BaseException:
            for host in made.values():
                print(f"---- {host.name}\n{host.log()[-3000:]}")
            raise


@contextlib.contextmanager
def gateway(coordinator: str, *more: str):
    """`quire gateway` that follows a coordinator; yields its URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = ["--port", str(port), "--coordinator", coordinator, "--worker-wait", "120", *more]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "quire", "gateway", *flags],
        env=os.environ | {"QUIRE_CLUSTER_TOKEN": TOKEN},
    )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            with urllib.request.urlopen(url + "/readyz", timeout=5):
                return True
        except OSError:
            return False

    try:
        wait_until(ready, "the gateway's readiness", START_S)
        yield url
    finally:
        process.terminate()
        process.wait(60)
