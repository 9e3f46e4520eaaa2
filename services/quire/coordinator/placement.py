"""Supervisors as Ray actors: where they run, found again by name.

Each replica has a placement group of one bundle, which holds the resources of all its ranks on one
host, and in it a detached actor of the same name; one that no host can hold has a bundle, and an
actor NAME/1, NAME/2 ... more, for each further host. Pools are told apart by node labels: a role as
a Ray resource could not change without a restart of the raylet.

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
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quire.coordinator import actors
from quire.coordinator.actors import NAMESPACE
from quire.coordinator.joining import (
    NICENESS,
    OBJECT_STORE_BYTES,
    RayError,
    own_address,
    why_not_connected,
)
from quire.coordinator.supervisor import Report, StaleTerm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from quire.config.fleet import CoordinatorConfig
    from quire.coordinator.capacity import Demand, Node
    from quire.coordinator.supervisor import Assignment

T = TypeVar("T")

logger = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 8.0
REPORT_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 60.0
SUPERVISOR_SILENCE_S = 60.0
"""For which a supervisor may leave a question unanswered before Ray shall start it again."""


class HeadAway(RayError):
    """Ray's head does not answer at the moment."""


class Unreachable(Exception):
    """A supervisor does not answer."""


class RayCluster:
    """A connection to Ray's head. Raises HeadAway from whatever needs the head."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._prefix = f"quire/{config.fleet}/"
        self._head = ThreadPoolExecutor(1, thread_name_prefix="ray-head")
        self._actors: dict[str, list[Any]] = {}
        """Pod -> supervisors by host, that of rank 0 first."""
        self._reports: dict[tuple[str, int], tuple[Future[Any], float]] = {}
        """(pod, host) -> a question that is not answered yet, and when it was asked."""
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
        os.environ.setdefault(*NICENESS)
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
        return await self._ask(actors.all_nodes)

    async def find(self) -> set[str]:
        """Pods whose supervisors run, or wait for a place, whoever placed them."""
        found = await self._ask(self._find)
        self._actors |= found
        return set(found)

    async def place(self, assignment: Assignment, demand: Demand, near: str) -> None:
        """Have Ray start supervisors as soon as there is room. Repeated, the first ones stay.

        `near`: the host it ran on before, preferred because its engine may still run there.
        """
        place = partial(self._place, assignment, demand, near)
        self._actors[assignment.pod] = await self._ask(place)

    async def remove(self, pod: str) -> None:
        """Give a pod's place back. Its engine, if any, is not told."""
        await self._ask(lambda: self._remove(pod))
        for number in range(len(self._actors.pop(pod, ()))):
            self._reports.pop((pod, number), None)

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
        """The supervisors' word; that of rank 0's host counts. Raises Unreachable."""
        numbers = range(len(self._actors[pod]))
        asked = await asyncio.gather(
            *(self._report(pod, number) for number in numbers), return_exceptions=True
        )
        for one in asked:
            if isinstance(one, BaseException) and (one is asked[0] or not _is_silence(one)):
                raise one
        first, *others = (one for one in asked if isinstance(one, Report))
        return first.with_others(others)

    async def _report(self, pod: str, number: int) -> Report:
        # Ray keeps calls for an actor that it has yet to start: one of each is enough
        key, actor = (pod, number), self._actors[pod][number]
        if key not in self._reports:
            self._reports[key] = actor.report.remote().future(), time.monotonic()
        asked, since = self._reports[key]
        try:
            report: Report = await self._answer(asked, REPORT_TIMEOUT_S)
        finally:
            if asked.done():
                self._reports.pop(key, None)
            elif time.monotonic() - since > SUPERVISOR_SILENCE_S:
                self._reports[key] = asked, time.monotonic()
                self._head.submit(_start_again, pod, actor)
        return report

    async def set_role(self, pod: str, term: int, role: str) -> None:
        """Raises Unreachable, StaleTerm; OSError when the engine does not take it."""
        actor = self._actors[pod][0]
        await self._answer(actor.set_role.remote(term, role).future(), COMMAND_TIMEOUT_S)

    async def stop(self, pod: str, term: int) -> None:
        """Have an engine drain and end, on all its hosts. Raises Unreachable, StaleTerm."""
        asked = [actor.stop.remote(term).future() for actor in self._actors[pod]]
        await asyncio.gather(*(self._answer(one, COMMAND_TIMEOUT_S) for one in asked))

    async def is_stopped(self, pod: str) -> bool:
        """Nothing is left of its engine. Raises Unreachable."""
        asked = [actor.is_stopped.remote().future() for actor in self._actors[pod]]
        return all(await asyncio.gather(*(self._answer(one, REPORT_TIMEOUT_S) for one in asked)))

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

    def _find(self) -> dict[str, list[Any]]:
        import ray

        found: dict[str, dict[int, Any]] = {}
        for name in self._names(""):
            pod, _, number = name.removeprefix(self._prefix).partition("/")
            with contextlib.suppress(ValueError):  # it has ended since
                found.setdefault(pod, {})[int(number or 0)] = ray.get_actor(name, NAMESPACE)
        for pod in [pod for pod, by_number in found.items() if 0 not in by_number]:
            self._remove(pod)  # a coordinator died while it placed this: rank 0's host comes last
            del found[pod]
        return {pod: [each[i] for i in sorted(each)] for pod, each in found.items()}

    def _names(self, pod: str) -> list[str]:
        """Of actors, of one pod or all."""
        from ray.util import list_named_actors

        start = self._prefix + pod
        names = [
            str(one["name"])
            for one in list_named_actors(all_namespaces=True)
            if one["namespace"] == NAMESPACE and str(one["name"]).startswith(start)
        ]
        return [name for name in names if not pod or name == start or name.startswith(f"{start}/")]

    def _place(self, assignment: Assignment, demand: Demand, near: str) -> list[Any]:
        name = self._prefix + assignment.pod
        group = actors.group(name) or actors.new_group(name, demand, near)
        hosts = group.bundle_count
        whole = replace(assignment, nodes=hosts)
        # who finds rank 0's may rely on the others
        others = [
            actors.supervisor(group, f"{name}/{number}", (replace(whole, node=number), name))
            for number in range(1, hosts)
        ]
        return [actors.supervisor(group, name, (whole, name)), *others]

    def _remove(self, pod: str) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for name in self._names(pod):
            with contextlib.suppress(ValueError):  # Ray has lost it already
                ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
        group = actors.group(self._prefix + pod)
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


def _is_silence(error: BaseException) -> bool:
    return isinstance(error, Unreachable)


def _missing(path: str, labels: Mapping[str, str]) -> list[str]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    hosts = {node.host: node for node in actors.all_nodes() if node.matches(labels) and node.cpus}
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


def _start_again(pod: str, actor: Any) -> None:
    """Where nobody waits for what comes of it: it is asked for again after as long a silence."""
    logger.warning("the supervisor of %s is silent: Ray is asked to start it again", pod)
    try:
        actors.start_again(actor)
    except Exception as error:  # noqa: BLE001 (Ray's own kinds, the head's absence among them)
        logger.warning("the supervisor of %s cannot be started again: %s", pod, error)
