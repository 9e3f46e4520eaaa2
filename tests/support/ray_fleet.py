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

from ray_hosts import (
    BIN,
    HEAD,
    TOKEN,
    Host,
    command_line,
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

    def show_processes(self) -> None:
        """Each process's memory, for people."""
        for name, host in self.hosts.items():
            for pid in host.pids():
                words = command_line(pid).replace(str(BIN) + "/", "")
                print(f"{name:6} {resident_bytes(pid) / 1e6:6.0f} MB  {words[:90]}")


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
    """`cpus`: of each host beside the head's and the coordinator's, whose name says the pool.

    `spare` is a host that has not joined yet; `before` runs before the head starts.
    """
    names = [*cpus, spare] if spare else [*cpus]
    with hosts("head", "ctl", *names, base=base) as made:
        fleet = Fleet(made, content, ROCKSDB if storage is None else storage)
        began = time.monotonic()
        before(made)
        fleet.start_head()
        fleet.start_raylets(ctl=0, **cpus)
        print(f"\nRay on {2 + len(cpus)} hosts: {time.monotonic() - began:.1f} s")
        fleet.up()
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
