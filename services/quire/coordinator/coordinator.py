"""The control loop: ask what runs, decide what is due, act on each pod, one thing at a time.

    take_over -> [ask all supervisors -> publish the topology -> decide -> act] twice a second

Gateways and routers follow the topology and find out by themselves whether a pod answers. A pod
whose supervisor is silent stays in it: engines outlive supervisors, raylets and Ray's head.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quire.config.address import ANY_HOST
from quire.coordinator import assignments
from quire.coordinator.joining import RayError
from quire.coordinator.placement import HeadAway, Unreachable
from quire.coordinator.reconcile import Place, Seen, SetRole, State, Stop, decide
from quire.coordinator.refusals import Refusals
from quire.coordinator.replica import Replica
from quire.coordinator.room import Refused, check_room
from quire.coordinator.supervisor import StaleTerm
from quire.coordinator.topology import Epoch, Pod, Topology, next_term

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from quire.config.fleet import Fleet
    from quire.coordinator.placement import RayCluster
    from quire.coordinator.reconcile import Action, Wanted
    from quire.coordinator.state import Record, StateFolder

logger = logging.getLogger(__name__)

TICK_S = 0.5
LEADER_S = 2.0
LEAVE_S = 0.7
"""Between leaving the topology and draining: requests move while the engine hands out blocks."""
STOP_POLL_S = 0.2
STOP_GRACE_S = 10.0


class Deposed(Exception):
    """Another coordinator has taken over."""


class Coordinator:
    """Keeps one fleet. Everything on one event loop."""

    def __init__(
        self,
        fleet: Fleet,
        cluster: RayCluster,
        folder: StateFolder,
        leads: Callable[[Mapping[str, Any]], Awaitable[bool]],
        drain: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        """`leads` asks a recorded coordinator whether it still leads, `drain` ends an engine by its
        address. Raises StateError."""
        self.fleet = fleet
        self.replicas: dict[str, Replica] = {}
        self.refused = Refusals()
        self.head_problem = ""
        self._cluster, self._folder, self._leads, self._drain = cluster, folder, leads, drain
        self._record: Record = folder.read()
        self.topology = self._record.topology or Topology(fleet.coordinator.fleet, Epoch(0, 0))
        self._former: dict[str, str] = {}
        """Pod -> address, of the predecessor's topology and not found on Ray."""
        self._drains: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()

    # ---- what there should be

    @property
    def term(self) -> int:
        """Of this coordinator; of its predecessor before `take_over`."""
        return self.topology.epoch.term

    @property
    def numbers(self) -> dict[str, int]:
        """Pool -> replicas wanted."""
        changed = self._record.replicas
        return {name: changed.get(name, pool.replicas) for name, pool in self.fleet.pools.items()}

    @property
    def wanted(self) -> dict[str, Wanted]:
        """Pod -> what it should be."""
        every = assignments.wanted(self.fleet, self.numbers, self._record.roles)
        return {want.name: want for want in every}

    # ---- the loop

    async def take_over(self) -> None:
        """Become the coordinator in charge. Raises Refused, HeadAway."""
        leader = await self._cluster.read_leader()
        if leader is not None and await self._leads(leader):
            raise Refused(
                f"another coordinator (process {leader['pid']} on {leader['host']}) runs fleet "
                f"{self.fleet.coordinator.fleet} at {leader['address']}: end that one first, or "
                "give this one another fleet name"
            )
        known = [self.term] + ([] if leader is None else [int(leader["term"])])
        term = next_term(known, time.time())
        about = {
            "term": term, "address": self._reached_at(),
            "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        found = await self._cluster.find()
        if found:
            logger.info("found running: %s", ", ".join(sorted(found)))
        else:
            await check_room(self.fleet, self._cluster, self.numbers)
        if not await self._cluster.claim(about):
            raise Refused("another coordinator of this fleet starts at this moment")
        before = {pod.name: pod.address for pod in self.topology.pods}
        self.replicas = {pod: Replica(published=before.get(pod, "")) for pod in found}
        self._former = {pod: at for pod, at in before.items() if pod not in found}
        self.topology = self.topology.in_term(term)

    def _reached_at(self) -> str:
        """Address under which another host's coordinator can ask this one."""
        listen = self.fleet.coordinator.listen
        host = self.fleet.listen_host
        if host in ANY_HOST and self._cluster.host:
            return self._cluster.host + listen.removeprefix(host).removeprefix(f"[{host}]")
        return listen

    async def run(self) -> None:
        """Until cancelled. Raises Deposed; before `take_over` nothing works."""
        looked = float("-inf")
        try:
            while True:
                if time.monotonic() - looked >= LEADER_S:
                    looked = time.monotonic()
                    await self._check_leader()
                await self._ask_all()
                self.refused.note(self.replicas, self.wanted)
                self._publish()
                for action in decide(self.wanted.values(), self._seen(), self.refused):
                    self._act(action)
                await self._pause()
        finally:
            jobs = [one.job for one in self.replicas.values() if one.job is not None]
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _pause(self) -> None:
        self._wake.clear()
        # not wait_for: with Python 3.11 that may swallow a cancellation
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S):
                await self._wake.wait()

    async def _check_leader(self) -> None:
        try:
            leader = await self._cluster.read_leader()
        except HeadAway as error:
            if not self.head_problem:
                logger.warning("%s: what runs goes on, nothing can be placed", error)
            self.head_problem = str(error)
            return
        self.head_problem = ""
        if leader is not None and leader["term"] > self.term:
            raise Deposed(
                f"the coordinator at {leader['address']} on {leader['host']} (process "
                f"{leader['pid']}) has taken over"
            )

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask(pod, one) for pod, one in tuple(self.replicas.items())))

    async def _ask(self, pod: str, one: Replica) -> None:
        if not self._cluster.knows(pod):
            return
        try:
            one.report = await self._cluster.report(pod)
            one.answers = True
        except Unreachable as error:
            one.answers = False
            logger.debug("supervisor of %s: %s", pod, error)

    def _seen(self) -> dict[str, Seen]:
        return {
            pod: Seen(
                pod,
                self._model_of(pod),
                one.state,
                one.report.digest if one.report else None,
                one.report.role if one.report and one.state is State.READY else None,
            )
            for pod, one in self.replicas.items()
        }

    def _model_of(self, pod: str) -> str:
        pool = assignments.pool_of(self.fleet, pod)
        return "" if pool is None else self.fleet.model_of(pool.name).name

    # ---- the topology

    def _publish(self) -> None:
        """Tell what to connect to, if it has changed."""
        for pod, one in self.replicas.items():
            self._choose_address(pod, one)
        pods = [
            Pod(pod, one.published, pod.rpartition("-")[0], self._model_of(pod))
            for pod, one in self.replicas.items()
            if one.published and not one.leaving
        ]
        # what the predecessor knew and Ray lost is in it until its successor runs
        pods += [
            Pod(pod, address, pod.rpartition("-")[0], self._model_of(pod))
            for pod, address in self._former.items()
            if pod in self.wanted and not (pod in self.replicas and self.replicas[pod].published)
        ]
        topology = self.topology.with_pods(pods)
        if topology is not self.topology or self._record.topology is None:
            self.topology = topology
            hosts = {p: r.report.host for p, r in self.replicas.items() if r.report is not None}
            self._write(hosts=self._record.hosts | hosts, topology=topology)
            self.tell_readers()

    def _choose_address(self, pod: str, one: Replica) -> None:
        """A pod that came up elsewhere takes the old one's place once it is ready."""
        now = one.report.address if one.report is not None else ""
        if not now or now == one.published:
            return
        before = one.published or self._former.get(pod, "")
        if before and before != now:
            if one.state is not State.READY:
                return
            self._former.pop(pod, None)
            logger.info("%s has moved from %s to %s", pod, before, now)
            self._drain_stray(before)
        one.published = now

    def _drain_stray(self, address: str) -> None:
        """End an engine that no supervisor looks after, if it still runs."""
        job = asyncio.create_task(self._drain(address), name=f"drain {address}")
        self._drains.add(job)
        job.add_done_callback(self._drains.discard)

    def tell_readers(self) -> None:
        """Have `changed` return."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Return with the next topology."""
        await self._changed.wait()

    def _write(self, **fields: Any) -> None:
        self._record = replace(self._record, **fields)
        self._folder.write(self._record)

    # ---- actions

    def _act(self, action: Action) -> None:
        """Start it, unless something is being done with the pod."""
        one = self.replicas.setdefault(action.name, Replica())
        if one.job is not None:
            if not one.job.done():
                return
            one.job.result()  # a bug in it ends the coordinator
        job: Coroutine[Any, Any, None]
        match action:
            case Place():
                job = self._place(action.name)
            case SetRole():
                job = self._set_role(action.name, action.role)
            case Stop():
                job = self._stop(action.name)
        one.job = asyncio.create_task(self._do(action.name, one, job), name=str(action))

    async def _do(self, pod: str, one: Replica, job: Coroutine[Any, Any, None]) -> None:
        try:
            await job
            one.problem = ""
        except (RayError, Unreachable, OSError, StaleTerm) as error:
            one.problem = str(error)
            logger.warning("%s: %s", pod, error)
            if one.report is None and not one.published:
                self.replicas.pop(pod, None)  # never placed: it is tried again
            await asyncio.sleep(LEADER_S)
        self._wake.set()

    async def _place(self, pod: str) -> None:
        want = self.wanted.get(pod)
        pool = assignments.pool_of(self.fleet, pod)
        if want is None or pool is None:
            return
        await self._cluster.place(
            assignments.assignment(self.fleet, want, self.term),
            assignments.demand(self.fleet, pool, 1),
            near=self._record.hosts.get(pod, ""),
        )

    async def _set_role(self, pod: str, role: str) -> None:
        await self._cluster.set_role(pod, self.term, role)

    async def _stop(self, pod: str) -> None:
        one = self.replicas[pod]
        one.leaving = True
        self._publish()
        if one.published:
            await asyncio.sleep(LEAVE_S)
        try:
            await self._cluster.stop(pod, self.term)
            drain_s = max(
                self.fleet.model_of(name).engine_of(name).drain_timeout_s
                for name in self.fleet.pools
            )
            async with asyncio.timeout(drain_s + STOP_GRACE_S):
                while not await self._cluster.is_stopped(pod):  # noqa: ASYNC110 - is a call
                    await asyncio.sleep(STOP_POLL_S)
        except (Unreachable, TimeoutError):
            if one.published:  # its supervisor is gone, the engine may not be
                await self._drain(one.published)
        await self._give_place_back(pod)
        del self.replicas[pod]

    async def _give_place_back(self, pod: str) -> None:
        while True:
            try:
                return await self._cluster.remove(pod)
            except HeadAway as error:
                self.replicas[pod].problem = str(error)
                await asyncio.sleep(LEADER_S)

    # ---- requests

    async def scale(self, numbers: Mapping[str, int]) -> None:
        """Other numbers of replicas; those that were refused are tried again, also with the same
        number. Raises Refused, HeadAway; then nothing has changed."""
        unknown = sorted(numbers.keys() - self.fleet.pools.keys())
        if unknown:
            raise Refused(
                f"no pool is called {unknown[0]}; there are {', '.join(self.fleet.pools)}"
            )
        again = self.refused.of_pools(numbers)
        if again or any(number > self.numbers[name] for name, number in numbers.items()):
            await check_room(
                self.fleet, self._cluster, self.refused.beside(self.numbers) | dict(numbers)
            )
        self._write(replicas=self._record.replicas | dict(numbers))
        for pod in again:
            self.refused.pop(pod, None)
        self._wake.set()

    async def set_role(self, pod: str, role: str) -> None:
        """Another role for one pod, done when this returns. Raises Refused."""
        if pod not in self.wanted or pod not in self.replicas:
            raise Refused(f"no pod is called {pod}; there are {', '.join(sorted(self.wanted))}")
        before = self._record.roles.get(pod)
        self._write_role(pod, role)  # first, or the loop would turn it back
        try:
            await self._cluster.set_role(pod, self.term, role)
        except (Unreachable, OSError, StaleTerm) as error:
            self._write_role(pod, before)
            raise Refused(
                f"{pod} does not take the role: {error}; try again when it is ready"
            ) from None

    def _write_role(self, pod: str, role: str | None) -> None:
        """None: as its pool says."""
        others = {name: had for name, had in self._record.roles.items() if name != pod}
        self._write(roles=others if role is None else others | {pod: role})

    async def remove_all(self) -> None:
        """End every pod, without asking for more. `run` must have ended."""
        for one in self.replicas.values():
            one.job = None
        await asyncio.gather(*(self._stop(pod) for pod in tuple(self.replicas)))

    async def drain_known(self) -> None:
        """End the engines of the last topology, where Ray cannot be asked to."""
        await asyncio.gather(*(self._drain(pod.address) for pod in self.topology.pods))
