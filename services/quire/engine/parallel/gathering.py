"""How the ranks beyond the first come together: started, or waited for, until all are connected."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from quire.cluster.tls import tls_context
from quire.config.base import to_mapping
from quire.engine.parallel import greeting
from quire.engine.parallel.channel import Channel, Kind
from quire.engine.parallel.members import Member, Node
from quire.engine.parallel.processes import RankOptions, RankProcess, current_log_level
from quire.engine.parallel.watch import LOADING_SILENCE_S, WATCH_S, RankFailed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from quire.config.engine import EngineConfig
    from quire.engine.parallel.spread import Spread

T = TypeVar("T")

logger = logging.getLogger(__name__)

START_S = 60.0
"""From starting the processes to the last hello: they greet before they load anything."""
HOSTS_S = 600.0
"""For other hosts to come up: their images may have to be fetched first."""


@dataclass(frozen=True)
class Plan:
    """What the ranks shall load."""

    engine: EngineConfig
    folder: Path
    """Where its model is on this host; another looks for it itself."""
    fingerprint: str
    """Of the files there."""


class Gathering:
    """Listens while it lasts. Raises ValueError, OSError."""

    def __init__(self, plan: Plan, spread: Spread) -> None:
        self._plan, self._spread = plan, spread
        self._size = plan.engine.tensor_parallel_size
        self._tls = tls_context(spread.cluster, server=True)
        own = spread.ranks_of(0, self._size)
        self._listener = _listen(spread.host, spread.port)
        self.host, self._port = self._listener.getsockname()[:2]
        """Address of this host, as the others reach it."""
        self._secret = secrets.token_hex(16)
        self.members = [self._spawn(rank) for rank in own[1:]]
        """By rank."""
        self.nodes = [Node(number) for number in range(1, spread.nodes)]
        for node in self.nodes:
            ranks = spread.ranks_of(node.number, self._size)
            self.members += [Member(rank, node=node) for rank in ranks]

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def wait(self) -> None:
        """Take in the connections of all; others are turned away. Raises RankFailed."""
        self._listener.settimeout(WATCH_S)
        began = time.monotonic()
        everyone: list[Node | Member] = [*self.nodes, *self.members]
        while any(one.channel is None for one in everyone):
            for member in self.members:
                if member.has_ended:
                    raise RankFailed(f"{member.name} {member.how_it_died()} while starting")
            self._check_times(began)
            self._hear_nodes()
            with contextlib.suppress(TimeoutError):
                self._greet(self._listener.accept()[0])

    def _check_times(self, began: float) -> None:
        """Hosts may take long to come up, the processes that they start then may not."""
        for node in self.nodes:
            _check_time(node, began, HOSTS_S)
        for member in self.members:
            host = member.node
            if host is None or host.channel is not None:
                _check_time(member, began if host is None else host.met, START_S)

    def _hear_nodes(self) -> None:
        """A host that has gone again, or hangs, may come back, and start its ranks anew."""
        for node in self.nodes:
            if node.channel is not None and (lost := _how_lost(node)):
                raise RankFailed(f"{node.name} {lost} while its ranks start")

    def _greet(self, sock: socket.socket) -> None:
        sock.settimeout(greeting.HELLO_S)
        try:
            channel = Channel.over(sock, self._tls, is_dialler=False)
        except OSError:
            return  # whoever it was
        hello = greeting.receive(channel, self._secret_of)
        if hello is None:
            logger.warning("turned %s away: it is not a rank of this engine", channel.peer)
            channel.close()
        elif "node" in hello:
            node = self._missing_node(hello)
            node.channel, node.secret = channel, hello["key"]
            node.met = node.heard = time.monotonic()
            self._start(node)
        else:
            member = self._missing_member(hello)
            member.channel, member.pid = channel, int(hello["pid"])

    def _secret_of(self, hello: dict[str, Any]) -> str:
        """What whoever says that must know. Raises LookupError for who is not waited for."""
        if "node" in hello:
            self._missing_node(hello)
            return self._spread.cluster.cluster_token or ""
        node = self._missing_member(hello).node
        return self._secret if node is None else node.secret

    def _missing_node(self, hello: dict[str, Any]) -> Node:
        wanted = (n for n in self.nodes if n.number == hello["node"] and n.channel is None)
        return _first(wanted)

    def _missing_member(self, hello: dict[str, Any]) -> Member:
        return _first(m for m in self.members if m.rank == hello["rank"] and m.channel is None)

    def _start(self, node: Node) -> None:
        """Have a host start its ranks."""
        assert node.channel is not None
        ranks = self._spread.ranks_of(node.number, self._size)
        options = {
            "engine": to_mapping(self._plan.engine),
            "fingerprint": self._plan.fingerprint,
            "ranks": list(ranks),
            "world_size": self._size,
            "log_level": current_log_level(),
        }
        with contextlib.suppress(OSError):  # it is seen to be gone
            node.channel.send_json(Kind.START, options)

    def _spawn(self, rank: int) -> Member:
        options = RankOptions(
            engine=replace(self._plan.engine, model=str(self._plan.folder)),
            rank=rank,
            world_size=self._size,
            local_rank=rank,
            local_size=len(self._spread.ranks_of(0, self._size)),
            node=0,
            master=(self.host, self._port),
            secret=self._secret,
            cluster=self._spread.cluster,
            log_level=current_log_level(),
        )
        process = RankProcess(options)
        return Member(rank, process, pid=process.pid)


def _check_time(one: Node | Member, began: float, limit_s: float) -> None:
    if one.channel is None and time.monotonic() - began > limit_s:
        raise RankFailed(f"{one.name} did not connect within {limit_s:.0f} s")


def _how_lost(node: Node) -> str:
    """One clause about a host that is connected, or was; empty while it does its part."""
    lost = ""
    try:
        node.hear()
    except (OSError, EOFError, ValueError):
        lost = node.how_it_died()
    if time.monotonic() - node.heard > LOADING_SILENCE_S:
        lost = f"has given no sign of life for {LOADING_SILENCE_S:.0f} s"
    ends = (f"says that rank {rank} {how}" for rank, how in node.ends.items())
    return next(ends, lost)


def _first(found: Iterable[T]) -> T:
    """Raises LookupError when there is none."""
    for one in found:
        return one
    raise LookupError


def _listen(host: str, port: int) -> socket.socket:
    """Raises OSError naming what is wrong with the address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(
            f"{host}:{port} cannot be listened on for the other hosts of this replica "
            f"({error.strerror or error}): --master-addr is an address of this host, --master-port "
            "a free port of it"
        ) from None
