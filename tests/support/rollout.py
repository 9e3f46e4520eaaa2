"""`quire worker`, `router` and `gateway` as processes of their own, as pods run them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field

from waiting import wait_until

TOKEN = "the-fleet's-token"
ENGINE = ("--max-model-len", "512", "--kv-cache-memory-bytes", "32M", "--num-threads", "1")
START_S = 60
END_S = 45


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@dataclass
class Process:
    """One `quire ...`, which can be ended and started again, at the same address."""

    command: tuple[str, ...]
    http_port: int
    process: subprocess.Popen | None = None

    def start(self) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quire", *self.command],
            env=kept | {"QUIRE_CLUSTER_TOKEN": TOKEN},
        )

    def end(self) -> None:
        """As the kubelet does, which has to be orderly."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(END_S)
        assert code == 0, f"{self.command[0]} ended with {code}"

    def get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", None, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"{self.command[0]} has ended"
        try:
            self.get("/readyz")
        except OSError:
            return False
        return True


@dataclass
class Fleet:
    """Prefill and decode workers, two routers of them, two gateways that ask these."""

    roles: dict[str, str]
    """Of the workers by name."""
    workers: dict[str, Process] = field(default_factory=dict)
    routers: dict[str, Process] = field(default_factory=dict)
    gateways: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ports = iter(free_ports(2 * (len(self.roles) + 2) + 2))
        addresses = {name: f"127.0.0.1:{next(ports)}" for name in self.roles}
        for name, role in self.roles.items():
            http = next(ports)
            self.workers[name] = Process(
                ("worker", *ENGINE, "--listen", addresses[name], "--http-port", str(http),
                 "--role", role, "--worker-name", name, "--kv-lease-s", "10",
                 "--kv-heartbeat-s", "2"), http,
            )  # fmt: skip
        named = [f"{name}={address}" for name, address in addresses.items()]
        pods = [word for one in named for word in ("--pod", one)]
        upstream = [word for one in named for word in ("--worker", one)]
        for name in ("router-0", "router-1"):
            listen, http = f"127.0.0.1:{next(ports)}", next(ports)
            upstream += ["--router", listen]
            flags = ("--http-port", str(http), "--routing-policy", "least_load")
            self.routers[name] = Process(("router", "--listen", listen, *pods, *flags), http)
        for name in ("gateway-0", "gateway-1"):
            http = next(ports)
            self.gateways[name] = Process(("gateway", *upstream, "--port", str(http)), http)

    @property
    def processes(self) -> dict[str, Process]:
        return self.workers | self.routers | self.gateways

    def pages(self) -> list[str]:
        """Metrics of every process that is there."""
        there = [p for p in self.processes.values() if p.process.poll() is None]
        return [process.get("/metrics") for process in there]

    def is_whole(self) -> bool:
        """All are ready, and every gateway knows it."""
        if not all(process.is_ready() for process in self.processes.values()):
            return False
        known = {
            f"quire_gateway_worker_up {float(len(self.workers))}",
            f"quire_gateway_routers_up {float(len(self.routers))}",
        }
        return all(known <= set(g.get("/metrics").splitlines()) for g in self.gateways.values())


@contextmanager
def running_fleet(**roles: str):
    fleet = Fleet(roles)
    try:
        for process in fleet.processes.values():
            process.start()
        wait_until(fleet.is_whole, "the fleet is there", START_S)
        yield fleet
    finally:
        for process in fleet.processes.values():
            if process.process is not None:
                process.process.kill()
                process.process.wait(10)
