"""Connections cut in either direction while nobody dies: every answer is the same, nothing leaks.

Each worker is a host of its own. A cut shows itself only by silence: no connection is reset.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest
from network import network
from pages import FailedTransfers, Growth, wait_released
from server import Server, running_server
from unlike import SMALL_STEPS, Load, assert_same_answers
from waiting import wait_until

pytestmark = pytest.mark.slow

TOKEN = "between the hosts"
ROLES = {"p": "prefill", "d1": "decode", "d2": "decode"}
ENGINE = (
    "--max-model-len", "512", "--kv-cache-memory-bytes", "32M", "--num-threads", "1", *SMALL_STEPS,
)  # fmt: skip
HTTP_PORT = 9080
CUT_S = 6.0
numbers = itertools.count()


@contextmanager
def running(command: list[str]):
    process = subprocess.Popen(command, env=os.environ | {"QUIRE_CLUSTER_TOKEN": TOKEN})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


class Fleet:
    """A gateway here, workers on hosts."""

    def __init__(self, net, server: Server) -> None:
        self.net = net
        self.server = server

    def up(self) -> float:
        return self.server.metric("quire_gateway_worker_up")

    def pages(self) -> list[str]:
        """Metrics of the gateway and of each worker."""
        hosts = [host.address for host in self.net.hosts.values()]
        return [self.server.get("/metrics"), *(page(f"http://{x}:{HTTP_PORT}") for x in hosts)]


def page(url: str) -> str:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(f"{url}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def fleet():
    quire = (sys.executable, "-m", "quire")
    with ExitStack() as stack:
        net = stack.enter_context(network(*ROLES))
        addresses = []
        for name, role in ROLES.items():
            host = net.hosts[name]
            command = host.command(
                *quire, "worker", *ENGINE, "--listen", f"{host.address}:9000", "--role", role,
                "--worker-name", name, "--kv-lease-s", "2", "--http-port", str(HTTP_PORT),
            )  # fmt: skip
            stack.enter_context(running(command))
            addresses += ["--worker", f"{host.address}:9000"]
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        gateway = running([
            *quire, "gateway", *addresses, "--port", str(port), "--worker-silence", "1.5",
            "--routing-policy", "least_load",
        ])  # fmt: skip
        fleet = Fleet(net, Server(port, stack.enter_context(gateway)))
        fleet.server.wait_ready()
        wait_until(lambda: fleet.up() == len(ROLES), "all workers are ready", 60)
        yield fleet


@pytest.fixture(scope="module")
def reference():
    """Nothing happens to it."""
    with running_server(*ENGINE) as server:
        yield server


def between(first: str, second: str, *, both: bool):
    """A cut of what `first` sends to `second`, and back."""

    def cut(net) -> None:
        address = {name: host.address for name, host in net.hosts.items()} | {"gw": net.address}
        net.hosts[first].mute(address[second])
        if both:
            net.hosts[second].mute(address[first])

    return cut


TRANSFERS, REQUESTS = "KV transfers failed", "requests went on elsewhere"
CUTS = {
    "prefill alone": (lambda net: net.hosts["p"].isolate(), {TRANSFERS}),
    "decode alone": (lambda net: net.hosts["d1"].isolate(), {TRANSFERS, REQUESTS}),
    "prefill from decode": (between("p", "d1", both=True), {TRANSFERS}),
    "prefill to decode": (between("p", "d1", both=False), {TRANSFERS}),
    "decode to prefill": (between("d1", "p", both=False), {TRANSFERS}),
    "decode to gateway": (between("d1", "gw", both=False), {REQUESTS}),
}
"""How, and what has to come of it."""


@pytest.mark.parametrize("delay", [0.3, 1.5])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_changes_no_answer(fleet, reference, cut, delay) -> None:
    harm, effects = CUTS[cut]
    load = Load([fleet.server.port], numbers)
    grown = {
        TRANSFERS: FailedTransfers(fleet.pages),
        REQUESTS: Growth(fleet.pages, "quire_gateway_resubmissions_total"),
    }

    async def disturbed() -> None:
        async with load.running():
            await asyncio.sleep(delay)
            try:
                await asyncio.to_thread(harm, fleet.net)
                await asyncio.sleep(CUT_S)
            finally:
                await asyncio.to_thread(fleet.net.heal)

    asyncio.run(disturbed())
    wait_until(lambda: fleet.up() == len(ROLES), "all workers are back", 60)
    assert_same_answers(reference, load.answers)
    wait_released(fleet.pages, len(ROLES))
    assert effects <= {what for what, growth in grown.items() if growth.look() > 0}
