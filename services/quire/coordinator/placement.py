"""Supervisors as Ray actors: where they run, found again by name.

Each replica has a placement group of one bundle, which holds the resources of all its ranks on one
host, and in it a detached actor of the same name. Pools are told apart by node labels: a role as a
Ray resource could not change without a restart of the raylet.

Ray is asked for places, and starts supervisors. It is neither asked whether an engine lives, nor in
the way of a token. What asks Ray's head may wait as long as that is away, so all of it goes through
one thread; who waits for that gives up after a while. Calls to actors do not need the head.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quire.coordinator.capacity import Node
from quire.coordinator.joining import (
    NODE_NAME,
    OBJECT_STORE_BYTES,
    RayError,
    own_address,
    why_not_connected,
)
from quire.coordinator.supervisor import Report, StaleTerm, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from quire.config.fleet import CoordinatorConfig, PoolConfig
    from quire.coordinator.supervisor import Assignment

T = TypeVar("T")

NAMESPACE = "quire"
HEAD_TIMEOUT_S = 8.0
REPORT_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 60.0


class HeadAway(RayError):
    """Ray's head does not answer at the moment."""


class Unreachable(Exception):
    """A supervisor does not answer."""


@dataclass(frozen=True)
class Room:
    """Where a replica may go."""

    cpus: float
    gpus: int
    labels: Mapping[str, str]
    near: str = ""
    """Host it ran on before: preferred, because its engine may still run there."""

    @classmethod
    def of(cls, pool: PoolConfig, near: str = "") -> Room:
        """What a replica of this pool needs."""
        return cls(pool.cpus, pool.gpus, pool.labels, near)

    @property
    def bundle(self) -> dict[str, float]:
        """Ray's resources."""
        return {k: v for k, v in (("CPU", self.cpus), ("GPU", float(self.gpus))) if v}


class RayCluster:
    """A connection to Ray's head. Raises HeadAway from whatever needs the head."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._prefix = f"quire/{config.fleet}/"
        self._head = ThreadPoolExecutor(1, thread_name_prefix="ray-head")
        self._actors: dict[str, Any] = {}
        self._reports: dict[str, Future[Any]] = {}
        self.dashboard_url = ""
        self.address = ""
        self.host = ""
        """Of this process, as Ray's other nodes reach it."""

    async def connect(self) -> None:
        """Join the cluster, or start one. Raises RayError."""
        await asyncio.get_running_loop().run_in_executor(self._head, self._connect)

    def disconnect(self) -> None:
        """Leave; a Ray of our own ends."""
        import ray

        ray.shutdown()

    def _connect(self) -> None:
        # read by Ray's C++ side when it starts
        os.environ.setdefault(
            "RAY_gcs_rpc_server_reconnect_timeout_s", str(self._config.ray_reconnect_s)
        )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import ray.util

        # that actors end with their placement groups is what is wanted here
        logging.getLogger("ray.actor").setLevel(logging.ERROR)
        options: dict[str, Any] = {
            "namespace": NAMESPACE, "log_to_driver": False, "logging_level": "warning",
            "configure_logging": False,
        }  # fmt: skip
        if self._config.is_local:
            options |= {
                "num_cpus": self._config.ray_cpus,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
            options |= {"address": "local"}
        else:
            options["address"] = self._config.ray
            if self._config.ray != "auto":
                # of several raylets that it finds, Ray would take any
                options["_node_ip_address"] = own_address(self._config.ray)
        try:
            context: Any = ray.init(**options)
        except (RuntimeError, ConnectionError, ValueError, AssertionError, OSError) as error:
            raise RayError(why_not_connected(self._config.ray, error)) from None
        self.address = context.address_info.get("gcs_address") or self._config.ray
        util: Any = ray.util
        self.host = str(util.get_node_ip_address())
        url = context.dashboard_url
        self.dashboard_url = f"http://{url}" if url else ""

    # ---- what needs the head

    async def nodes(self) -> list[Node]:
        """All hosts that live."""
        return await self._ask(_nodes)

    async def find(self) -> set[str]:
        """Pods whose supervisors run, or wait for a place, whoever placed them."""
        found = await self._ask(self._find)
        self._actors |= found
        return set(found)

    async def place(self, assignment: Assignment, room: Room) -> None:
        """Have Ray start a supervisor as soon as there is room. Repeated, the first one stays."""
        self._actors[assignment.pod] = await self._ask(lambda: self._place(assignment, room))

    async def remove(self, pod: str) -> None:
        """Give a pod's place back. Its engine, if any, is not told."""
        await self._ask(lambda: self._remove(pod))
        self._actors.pop(pod, None)
        self._reports.pop(pod, None)

    async def missing(self, path: str, labels: Mapping[str, str]) -> list[str]:
        """Hosts with these labels where a file or folder is not."""
        return await self._ask(lambda: _missing(path, labels), PROBE_TIMEOUT_S)

    async def read_leader(self) -> dict[str, Any] | None:
        """What the coordinator in charge has left about itself."""
        return await self._ask(self._read_leader)

    async def claim(self, leader: dict[str, Any]) -> bool:
        """Be the coordinator in charge; False when another one took this term."""
        return await self._ask(lambda: self._claim(leader))

    # ---- what does not

    def knows(self, pod: str) -> bool:
        """It was placed, or found."""
        return pod in self._actors

    async def report(self, pod: str) -> Report:
        """A supervisor's word. Raises Unreachable."""
        # Ray keeps calls for an actor that it has yet to start: one of each pod is enough
        asked = self._reports.get(pod)
        if asked is None:
            asked = self._reports[pod] = self._actors[pod].report.remote().future()
        try:
            report: Report = await self._answer(asked, REPORT_TIMEOUT_S)
        finally:
            if asked.done():
                self._reports.pop(pod, None)
        return report

    async def set_role(self, pod: str, term: int, role: str) -> None:
        """Raises Unreachable, StaleTerm; OSError when the engine does not take it."""
        actor = self._actors[pod]
        await self._answer(actor.set_role.remote(term, role).future(), COMMAND_TIMEOUT_S)

    async def stop(self, pod: str, term: int) -> None:
        """Have an engine drain and end. Raises Unreachable, StaleTerm."""
        await self._answer(self._actors[pod].stop.remote(term).future(), COMMAND_TIMEOUT_S)

    async def is_stopped(self, pod: str) -> bool:
        """Nothing is left of its engine. Raises Unreachable."""
        actor = self._actors[pod]
        return bool(await self._answer(actor.is_stopped.remote().future(), REPORT_TIMEOUT_S))

    async def _answer(self, future: Future[Any], timeout_s: float) -> Any:
        import ray

        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(asyncio.wrap_future(future))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StaleTerm | OSError):
                raise error.cause from None
            raise
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise Unreachable(str(error).splitlines()[0] if str(error) else "no answer") from None

    async def _ask(self, question: Callable[[], T], timeout_s: float = HEAD_TIMEOUT_S) -> T:
        """In the one thread; questions behind one that waits for the head time out as well."""
        answer = self._head.submit(question)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(asyncio.wrap_future(answer))
        except TimeoutError:
            answer.cancel()  # unless it has begun
            raise HeadAway("Ray's head does not answer") from None

    # ---- in the thread

    def _find(self) -> dict[str, Any]:
        import ray
        from ray.util import list_named_actors

        names = [
            str(one["name"])
            for one in list_named_actors(all_namespaces=True)
            if one["namespace"] == NAMESPACE and str(one["name"]).startswith(self._prefix)
        ]
        found = {}
        for name in names:
            try:
                found[name.removeprefix(self._prefix)] = ray.get_actor(name, NAMESPACE)
            except ValueError:  # it has ended since
                continue
        return found

    def _place(self, assignment: Assignment, room: Room) -> Any:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        name = self._prefix + assignment.pod
        near = [
            node.id for node in _nodes() if node.host == room.near and node.matches(room.labels)
        ]
        group = _group(name) or placement_group(
            [room.bundle],
            strategy="STRICT_PACK",
            name=name,
            lifetime="detached",
            _soft_target_node_id=near[0] if near else None,
            bundle_label_selector=[dict(room.labels)] if room.labels else None,
        )
        actor: Any = ray.remote(SupervisorActor)
        return actor.options(
            name=name,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=4,
            num_cpus=0,
            num_gpus=room.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        ).remote(assignment)

    def _remove(self, pod: str) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        name = self._prefix + pod
        with contextlib.suppress(ValueError):  # Ray has lost it already
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
        group = _group(name)
        if group is not None:
            remove_placement_group(group)

    def _read_leader(self) -> dict[str, Any] | None:
        from ray.experimental import internal_kv

        raw = internal_kv._internal_kv_get(self._prefix + "leader", namespace=NAMESPACE)
        leader: dict[str, Any] | None = None if raw is None else json.loads(raw)
        return leader

    def _claim(self, leader: dict[str, Any]) -> bool:
        from ray.experimental import internal_kv

        # created only if it is not there: of two that want a term one gets it
        key = f"{self._prefix}term/{leader['term']}"
        taken = internal_kv._internal_kv_put(key, b"1", overwrite=False, namespace=NAMESPACE)
        if not taken:
            record = json.dumps(leader).encode()
            internal_kv._internal_kv_put(self._prefix + "leader", record, namespace=NAMESPACE)
        return not taken


class SupervisorActor(Supervisor):
    """A supervisor inside a Ray worker process."""

    def __init__(self, assignment: Assignment) -> None:
        import ray

        util: Any = ray.util
        known_as = os.environ.get(NODE_NAME, "")  # the raylet's own environment is ours too
        super().__init__(assignment, str(util.get_node_ip_address()), known_as)


def _nodes() -> list[Node]:
    import ray

    known: Any = ray
    return [
        Node(
            id=str(node["NodeID"]),
            host=str(node["NodeManagerAddress"]),
            cpus=float(node["Resources"].get("CPU", 0)),
            gpus=float(node["Resources"].get("GPU", 0)),
            labels=dict(node.get("Labels") or {}),
        )
        for node in known.nodes()
        if node["Alive"]
    ]


def _group(name: str) -> Any:
    """A placement group by name, None when there is none."""
    from ray.util.placement_group import get_placement_group

    try:
        return get_placement_group(name)
    except ValueError:
        return None


def _missing(path: str, labels: Mapping[str, str]) -> list[str]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    hosts = {node.host: node for node in _nodes() if node.matches(labels) and node.cpus}
    probe: Any = ray.remote(_exists)
    asked = {
        host: probe.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote(path)
        for host, node in hosts.items()
    }
    return [host for host, answer in asked.items() if not ray.get(answer, timeout=PROBE_TIMEOUT_S)]


def _exists(path: str) -> bool:
    return Path(path).exists()
