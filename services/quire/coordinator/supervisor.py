"""Keeps one engine: finds it or starts it, watches it, starts it again when it has died.

    adopt ─▶ starting ──answers──▶ ready ──asked──▶ stopping ─▶ (gone)
      start ─▶ │ dies                │ dies
        ▲      ▼                     ▼
        └─ restarting: 0.5, 1, 2 ... 30 s; back to the first after a calm minute
           failed: it cannot be started here now, or not again; tried again every 30 s
           refused: it said that it cannot serve with these options, and never has; for good

An engine that answers no probe any more is killed: one that is stopped, or whose event loop hangs,
would never die. A restarted engine keeps its port and its devices: who knows its address finds it
again although nobody that could tell them is there. Knows nothing of Ray;
`quire.coordinator.placement` makes an actor of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from quire.cluster.rpc import Cluster
from quire.config.address import split_address
from quire.config.cluster import ClusterConfig
from quire.coordinator import engine_process, files
from quire.coordinator.back_off import LONGEST_DELAY_S, next_delay_s
from quire.coordinator.model_files import local_paths, missing
from quire.coordinator.probing import PROBE_S, Silence, health
from quire.coordinator.reconcile import State
from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.coordinator.engine_process import Engine, Exit
    from quire.proto.worker_pb2_grpc import WorkerAsyncStub

logger = logging.getLogger(__name__)

WATCH_S = 0.1
"""Between two looks at the engine's process."""
KILL_GRACE_S = 5.0
"""On top of its own drain timeout, for an engine that was told to end."""
COMMAND_TIMEOUT_S = 5.0
WEIGHTS = {"prefill": (1.0, 0.0), "decode": (0.0, 1.0), "both": (1.0, 1.0)}
"""Role -> share of prefill and of decode work."""


class StaleTerm(Exception):
    """A command of a coordinator that another one has taken over from."""


@dataclass(frozen=True)
class Assignment:
    """What a supervisor shall keep running. Sent between hosts: plain values only."""

    fleet: str
    pod: str
    term: int
    digest: str
    role: str
    host: str | None
    """To listen on; None for the node's own address."""
    port: int
    orphan_s: float
    drain_s: float
    options: dict[str, Any] = field(repr=False)
    """Of `quire worker`, without addresses and role."""
    cluster: dict[str, Any] = field(repr=False)
    """Token and certificates."""
    nodes: int = 1
    """Hosts that the replica's ranks are on."""
    node: int = 0
    """The host among them that is meant."""


@dataclass(frozen=True)
class Report:
    """A replica as its supervisor sees it. Sent between hosts: plain values only."""

    state: State
    digest: str
    role: str
    reason: str = ""
    address: str = ""
    host: str = ""
    pid: int = 0
    restarts: int = 0
    resident_bytes: int = 0
    startup_s: float = 0.0
    adopted: bool = False
    master: str = ""
    """Where rank 0 meets the ranks of other hosts."""

    def with_others(self, others: Iterable[Report]) -> Report:
        """The replica, when the report is of rank 0's host, from those of its other hosts too."""
        others = tuple(others)
        said = (f"host {one.host}: {one.reason}" for one in others if one.reason)
        return replace(
            self,
            reason=self.reason or next(said, ""),
            resident_bytes=self.resident_bytes + sum(one.resident_bytes for one in others),
        )


class Supervisor:
    """Starts its work at once, in a thread of its own. All methods from any thread."""

    def __init__(
        self, assignment: Assignment, node_host: str = "127.0.0.1", known_as: str = ""
    ) -> None:
        """`node_host` is this host's address, `known_as` a name under which others reach it.

        Raises OSError when the engine's folder cannot be used.
        """
        self._assignment = assignment
        a = assignment
        self._host = a.host or known_as or node_host
        self._folder: Path = files.engine_folder(a.fleet, a.pod, a.node)
        self._term = assignment.term
        self._cluster = Cluster(ClusterConfig(**assignment.cluster))
        self._report = Report(State.STARTING, assignment.digest, assignment.role, host=node_host)
        self._proven = ""
        """Digest of options with which the engine has been ready here."""
        self._stopping = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=assignment.pod, daemon=True)
        self._thread.start()

    def report(self) -> Report:
        """How it stands."""
        return replace(self._report, resident_bytes=files.resident_bytes(self._report.pid))

    def set_role(self, term: int, role: str) -> None:
        """Another role for the engine, now and after restarts.

        Raises StaleTerm; OSError when the engine does not take it.
        """
        self._check(term)
        command = asyncio.run_coroutine_threadsafe(self._send_role(role), self._loop)
        command.result(COMMAND_TIMEOUT_S + 1)
        self._report = replace(self._report, role=role)

    def stop(self, term: int) -> None:
        """Drain and end the engine. `is_stopped` says when it is done. Raises StaleTerm."""
        self._check(term)
        self._stopping.set()

    def is_stopped(self) -> bool:
        """Nothing is left of the engine."""
        return not self._thread.is_alive()

    # ---- in the thread

    def _run_loop(self) -> None:
        executor = ThreadPoolExecutor(2, thread_name_prefix="engine")
        with executor, contextlib.closing(self._loop):
            self._loop.set_default_executor(executor)
            self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        engine = await asyncio.to_thread(self._adopt)
        delay = 0.0
        while not self._stopping.is_set():
            try:
                if engine is None:
                    engine = await asyncio.to_thread(self._start)
            except OSError as error:
                self._report = replace(self._report, state=State.FAILED, reason=str(error), pid=0)
                await self._pause(LONGEST_DELAY_S)
                continue
            ready_s = await self._watch(engine)
            if self._stopping.is_set():
                break
            ended = await asyncio.to_thread(engine_process.exit_of, self._folder, engine)
            delay = next_delay_s(delay, ready_s)
            await self._recover(ended, delay)
            engine = None
        if engine is not None:
            await self._end(engine)

    def _adopt(self) -> Engine | None:
        """The engine that runs here already; one with other options is drained first."""
        files.renew_lease(self._folder)
        engine = engine_process.find(self._folder)
        if engine is not None:
            logger.info("%s: found at %s", self._assignment.pod, engine.address)
            # its digest is what runs: the coordinator sees it and replaces the engine in its turn
            self._show(engine, adopted=True)
        return engine

    def _start(self) -> Engine:
        """Raises OSError."""
        before = files.read_json(self._folder / files.ENGINE) or {}
        address = self._free_address(before.get("address", ""), self._assignment.port)
        own = {"listen": address, "role": self._report.role}
        master = ""
        if self._assignment.nodes > 1:
            master = self._free_address(before.get("master", ""), 0)
        return self._launch(own, address, master)

    def _launch(self, own: dict[str, Any], address: str, master: str, leader: int = 0) -> Engine:
        """With options of its own beside those of the pool. Raises OSError."""
        a = self._assignment
        before = files.read_json(self._folder / files.ENGINE) or {}
        self._require_files()
        if master:
            host, port = split_address(master)
            own |= {"nnodes": a.nodes, "node_rank": a.node}
            own |= {"master_addr": host, "master_port": port}
        launch = engine_process.Launch(
            options=a.options | own | {"worker_name": a.pod},
            address=address,
            digest=a.digest,
            token=a.cluster.get("cluster_token"),
            orphan_s=a.orphan_s,
            gpus=before.get("gpus"),
            master=master,
            leader=leader,
        )
        engine = engine_process.start(self._folder, launch)
        self._show(engine, adopted=False)
        return engine

    def _require_files(self) -> None:
        """What is not here may be copied yet, or its volume be mounted: no refusal of the engine's.
        Raises OSError."""
        for path in local_paths(self._assignment.options):
            if not Path(path).exists():
                pool = self._assignment.pod.rpartition("-")[0]
                raise OSError(missing(path, self._report.host, pool))

    def _free_address(self, before: str, wanted: int) -> str:
        """The one of the engine before, where it can be had again; or with the wanted port, or any.
        Raises OSError."""
        if before and not wanted:
            host, port = split_address(before)
            if host == self._host:
                try:
                    return _join(host, engine_process.free_port(host, port))
                except OSError as error:
                    logger.warning("%s: another port this time: %s", self._assignment.pod, error)
        return _join(self._host, engine_process.free_port(self._host, wanted))

    def _show(self, engine: Engine, *, adopted: bool) -> None:
        self._report = replace(
            self._report,
            state=State.STARTING,
            reason="",
            address=engine.address,
            digest=engine.digest,
            pid=engine.process.pid,
            startup_s=0.0,
            adopted=adopted,
            master=engine.master,
        )

    async def _watch(self, engine: Engine) -> float:
        """Until the engine ends or shall end; returns for how long it was ready."""
        began, ready_since, probed = time.monotonic(), None, float("-inf")
        silence = Silence()
        async with self._cluster.channel(engine.address) as channel:
            stub: WorkerAsyncStub = WorkerStub(channel)
            while engine.is_alive and not self._stopping.is_set():
                files.renew_lease(self._folder)
                if time.monotonic() - probed >= PROBE_S:
                    probed = time.monotonic()
                    answer = await health(stub)
                    silence.note(answered=answer is not None)
                    if ready_since is None and answer is not None and answer.ready:
                        ready_since = time.monotonic()
                        self._show_ready(answer, ready_since - began)
                    if silence.is_too_long(ready_since is not None):
                        logger.error("%s: answers no probe: killed", self._assignment.pod)
                        engine_process.kill(engine)
                await asyncio.sleep(WATCH_S)
        return 0.0 if ready_since is None else time.monotonic() - ready_since

    def _show_ready(self, health: worker_pb2.HealthReport, took_s: float) -> None:
        weights = (health.prefill_weight, health.decode_weight)
        role = {pair: role for role, pair in WEIGHTS.items()}.get(weights, "both")
        took_s = 0.0 if self._report.adopted else took_s
        self._report = replace(self._report, state=State.READY, role=role, startup_s=took_s)
        self._proven = self._report.digest

    async def _recover(self, ended: Exit, delay_s: float) -> None:
        """Say what happened, and wait before the next attempt."""
        state, restarts = State.RESTARTING, self._report.restarts + 1
        if ended.is_refusal and self._proven == self._assignment.digest:
            state, delay_s = State.FAILED, LONGEST_DELAY_S  # something around it has changed
        elif ended.is_refusal:
            state, restarts, delay_s = State.REFUSED, restarts - 1, math.inf
        self._report = replace(
            self._report, state=state, reason=ended.reason, pid=0, restarts=restarts
        )
        logger.error("%s: %s", self._assignment.pod, ended.reason)
        await self._pause(delay_s)

    async def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._stopping.is_set():  # noqa: ASYNC110
            await asyncio.sleep(WATCH_S)

    async def _end(self, engine: Engine) -> None:
        self._report = replace(self._report, state=State.STOPPING)
        engine_process.drain(engine)
        deadline = time.monotonic() + self._assignment.drain_s + KILL_GRACE_S
        while engine.is_alive:
            files.renew_lease(self._folder)
            if time.monotonic() > deadline:
                engine_process.kill(engine)
            await asyncio.sleep(WATCH_S)

    async def _send_role(self, role: str) -> None:
        prefill, decode = WEIGHTS[role]
        weights = worker_pb2.SetRole(prefill_weight=prefill, decode_weight=decode)
        async with self._cluster.channel(self._report.address) as channel:
            stub: WorkerAsyncStub = WorkerStub(channel)
            try:
                reply = await stub.Control(
                    worker_pb2.ControlRequest(set_role=weights), timeout=COMMAND_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                raise OSError(f"{self._assignment.pod}: {error.details()}") from None
        if not reply.ok:
            raise OSError(f"{self._assignment.pod}: {reply.message}")

    def _check(self, term: int) -> None:
        if term < self._term:
            raise StaleTerm(f"a command of term {term}, after one of term {self._term}")
        self._term = term


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
