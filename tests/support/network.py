"""Network namespaces: processes with addresses of their own, and connections that can be cut.

    this namespace   bridge 10.77.N.1
                       |  veth per host
    host i           10.77.N.(i + 2), alone in its namespace

Needs root and iproute2.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_numbers = itertools.count(1)


def ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass(frozen=True)
class Host:
    """One namespace."""

    namespace: str
    link: str
    """Its end of the connection, in this namespace."""
    address: str

    def command(self, *command: str) -> list[str]:
        """A command as run there."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def isolate(self) -> None:
        """Cut it off: nothing leaves, nothing arrives, and nobody is told."""
        ip("link", "set", self.link, "nomaster")

    def mute(self, other: str) -> None:
        """Lose what it sends to an address; what comes from there still arrives."""
        ip("-n", self.namespace, "route", "add", "blackhole", f"{other}/32")


class Network:
    """Hosts on one bridge."""

    def __init__(self, names: Sequence[str]) -> None:
        number = next(_numbers)
        self._tag = f"q{os.getpid() % 100000}-{number}"
        self._bridge = f"{self._tag}b"
        self.address = f"10.77.{number}.1"
        self.hosts = {
            name: Host(f"{self._tag}{name}", f"{self._tag}{i}", f"10.77.{number}.{i + 2}")
            for i, name in enumerate(names)
        }

    def build(self) -> None:
        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        for host in self.hosts.values():
            ip("netns", "add", host.namespace)
            inner = ("peer", "name", "eth0", "netns", host.namespace)
            ip("link", "add", host.link, "type", "veth", *inner)
            ip("link", "set", host.link, "master", self._bridge, "up")
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.namespace, "link", "set", "eth0", "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")

    def heal(self) -> None:
        """Undo every cut."""
        for host in self.hosts.values():
            ip("link", "set", host.link, "master", self._bridge)
            ip("-n", host.namespace, "route", "flush", "type", "blackhole", check=False)

    def remove(self) -> None:
        for host in self.hosts.values():
            ip("netns", "del", host.namespace, check=False)
            ip("link", "del", host.link, check=False)
        ip("link", "del", self._bridge, check=False)


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Hosts by name; the test is skipped where namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    net = Network(names)
    try:
        net.build()
        yield net
    finally:
        net.remove()
