"""Connections cut in either direction while nobody dies: every answer is the same, nothing leaks.

Each worker is a host of its own. A cut shows itself only by silence: no connection is reset.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest
from network import network
from server import Server
from test_continuation import all_texts
from waiting import wait_until

pytestmark = pytest.mark.slow

TOKEN = "between the hosts"
ROLES = {"p": "prefill", "d1": "decode", "d2": "decode"}
ENGINE = ("--max-model-len", "512", "--kv-cache-memory-bytes", "32M", "--num-threads", "1")
HTTP_PORT = 9080
CUT_S = 6.0
NUMBERS = range(40)


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

    def blocks_held(self) -> float:
        """Owned, over all workers: each has a page of its own."""
        addresses = [host.address for host in self.net.hosts.values()]
        return sum(owned(f"http://{address}:{HTTP_PORT}/metrics") for address in addresses)


def owned(page: str) -> float:
    request = urllib.request.Request(page, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    [line] = [x for x in lines if x.startswith("quire_kv_blocks{") and 'state="owned"' in x]
    return float(line.rsplit(" ", 1)[1])


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
        ])  # fmt: skip
        fleet = Fleet(net, Server(port, stack.enter_context(gateway)))
        fleet.server.wait_ready()
        wait_until(lambda: fleet.up() == len(ROLES), "all workers are ready", 60)
        yield fleet


@pytest.fixture(scope="module")
def want(fleet):
    """The answers of an undisturbed run."""
    return asyncio.run(all_texts(fleet.server.port, NUMBERS, 8))


def between(first: str, second: str, *, both: bool):
    """A cut of what `first` sends to `second`, and back."""

    def cut(net) -> None:
        address = {name: host.address for name, host in net.hosts.items()} | {"gw": net.address}
        net.hosts[first].mute(address[second])
        if both:
            net.hosts[second].mute(address[first])

    return cut


CUTS = {
    "prefill alone": lambda net: net.hosts["p"].isolate(),
    "decode alone": lambda net: net.hosts["d1"].isolate(),
    "prefill from decode": between("p", "d1", both=True),
    "prefill to decode": between("p", "d1", both=False),
    "decode to prefill": between("d1", "p", both=False),
    "decode to gateway": between("d1", "gw", both=False),
}


@pytest.mark.parametrize("delay", [0.3, 1.5])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_changes_no_answer(fleet, want, cut, delay) -> None:
    async def disturbed():
        async def disturb() -> None:
            await asyncio.sleep(delay)
            try:
                await asyncio.to_thread(CUTS[cut], fleet.net)
                await asyncio.sleep(CUT_S)
            finally:
                await asyncio.to_thread(fleet.net.heal)

        got, _ = await asyncio.gather(all_texts(fleet.server.port, NUMBERS, 8), disturb())
        return got

    got = asyncio.run(disturbed())
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one == other, f"request {number}"
    wait_until(lambda: fleet.up() == len(ROLES), "all workers are back", 60)
    wait_until(lambda: fleet.blocks_held() == 0, "no block is owned", 30)
