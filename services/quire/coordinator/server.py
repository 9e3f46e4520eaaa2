"""The coordinator process.

    listen -> state of the predecessor -> Ray -> take over -> control loop

Exit codes: 0 after an orderly stop, 1 when another coordinator took over, 2 when it cannot serve
(one line on stderr says what to change). It may be killed at any moment: engines, and their
supervisors on Ray, run on and are found again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from quire.cluster.rpc import Cluster
from quire.config.exit_codes import CANNOT_SERVE
from quire.config.last_word import PREFIX
from quire.coordinator.client import drain_engine, leads
from quire.coordinator.coordinator import Coordinator, Deposed
from quire.coordinator.joining import RayError
from quire.coordinator.placement import HeadAway, RayCluster
from quire.coordinator.room import NoRoom, Refused
from quire.coordinator.service import CoordinatorService
from quire.coordinator.splits import check_splits
from quire.coordinator.state import StateError, StateFolder
from quire.proto import coordinator_pb2_grpc
from quire.telemetry.instruments import new_registry, render

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import grpc

    from quire.config.fleet import Fleet

logger = logging.getLogger(__name__)

DEPOSED = 1
RETRY_S = 5.0
STOP_GRACE_S = 0.5
TAKE_OVER_S = 20.0
"""For a coordinator that shall end its fleet before it has reached Ray."""


async def serve(
    fleet: Fleet, *, ended: Callable[[], Awaitable[None]], ends_with_fleet: bool
) -> int:
    """Run until SIGTERM or SIGINT, or until `ended` returns; returns the exit code.

    SIGTERM leaves the fleet running for the next coordinator. SIGINT, and `ended` where
    `ends_with_fleet`, end it; so does, there, that every replica is refused.
    """
    try:
        folder = StateFolder(fleet.coordinator.folder)
    except StateError as error:
        return _cannot(str(error))
    network = Cluster(fleet.transfer)
    server = network.server()
    ray = RayCluster(fleet.coordinator)
    status: asyncio.Task[None] | None = None
    try:
        coordinator = Coordinator(
            fleet, ray, folder, partial(leads, network), partial(drain_engine, network)
        )
        service = CoordinatorService(coordinator, ray)
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, server)
        _listen(network, server, fleet.coordinator.listen)
        status = _serve_status(fleet, service)
        await server.start()
        try:
            return await _run(coordinator, service, ray, _Ending(ended, ends_with_fleet))
        finally:
            service.end()
    except (StateError, Refused, RayError) as error:
        return _cannot(str(error))
    except OSError as error:
        return _cannot(f"the coordinator cannot serve: {error}")
    except Deposed as error:
        print(f"{PREFIX}{error}", file=sys.stderr, flush=True)
        return DEPOSED
    finally:
        if status is not None:
            status.cancel()
        await server.stop(STOP_GRACE_S)
        ray.disconnect()
        folder.close()


def _listen(network: Cluster, server: grpc.aio.Server, address: str) -> None:
    """Raises OSError with what to change."""
    try:
        network.bind(server, address)
    except OSError as error:
        raise OSError(f"{error}; give the fleet another address as listen") from None


def _serve_status(fleet: Fleet, service: CoordinatorService) -> asyncio.Task[None] | None:
    """Probes over HTTP, on the event loop that they ask about. Raises OSError."""
    config = fleet.coordinator
    if not config.http_port:
        return None
    from quire.cluster.status_server import Status, open_socket, serve_status

    registry = new_registry("coordinator")
    status = Status(
        lambda: render(registry),
        lambda: True,
        lambda: service.in_charge,
        fleet.transfer.cluster_token,
    )
    return asyncio.create_task(serve_status(status, open_socket(config.listen, config.http_port)))


class _Ending:
    """When the process shall end, and whether the fleet ends with it."""

    def __init__(self, ended: Callable[[], Awaitable[None]], ends_with_fleet: bool) -> None:
        self.with_fleet = False
        self.reason = ""
        """What to change, where there is no use in going on."""
        self._event = asyncio.Event()
        self._ended, self._ends_with_fleet = ended, ends_with_fleet
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._event.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    def _interrupt(self) -> None:
        self.with_fleet = True
        self._event.set()

    async def wait(self, nothing_left: Callable[[], Awaitable[str]]) -> None:
        """Return when it shall end. `nothing_left` counts where nobody else asks of the fleet."""
        parent = asyncio.ensure_future(self._ended())
        asked = asyncio.ensure_future(self._event.wait())
        spent = asyncio.ensure_future(
            nothing_left() if self._ends_with_fleet else asyncio.Event().wait()
        )
        try:
            await asyncio.wait((parent, asked, spent), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (parent, asked, spent):
                one.cancel()
        if spent.done():
            self.reason, self.with_fleet = str(spent.result()), True
        elif parent.done():
            parent.result()
            self.with_fleet = self._ends_with_fleet


async def _run(
    coordinator: Coordinator, service: CoordinatorService, ray: RayCluster, ending: _Ending
) -> int:
    stop = asyncio.create_task(ending.wait(coordinator.refused.everyone))
    working = asyncio.create_task(_work(coordinator, service, ray))
    await asyncio.wait((stop, working), return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        stop.cancel()
        working.result()
    elif ending.with_fleet and coordinator.topology.pods and not service.in_charge:
        # what a predecessor left is not ours to end before it is in our hands
        await asyncio.wait(
            (working, asyncio.create_task(service.charge.wait())), timeout=TAKE_OVER_S
        )
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    if ending.with_fleet:
        logger.info("ending the fleet")
        await (coordinator.remove_all() if service.in_charge else coordinator.drain_known())
    return _cannot(ending.reason) if ending.reason else 0


async def _work(coordinator: Coordinator, service: CoordinatorService, ray: RayCluster) -> None:
    """Raises Refused and RayError while nothing runs yet, and Deposed."""
    config = coordinator.fleet.coordinator
    try:
        await check_splits(coordinator.fleet)
    except ValueError as error:
        raise Refused(str(error)) from None
    deadline = time.monotonic() + config.ray_wait_s
    connected = False
    while True:
        try:
            if not connected:
                await ray.connect()
                connected = True
            await coordinator.take_over()
            break
        except (RayError, NoRoom) as error:
            # pods may run, and gateways want to know where
            patient = isinstance(error, HeadAway) or (
                isinstance(error, RayError) and coordinator.topology.pods
            )
            if not patient and time.monotonic() >= deadline:
                raise
            logger.warning("%s; trying again in %g s", error, RETRY_S)
            await asyncio.sleep(RETRY_S)
    service.charge.set()
    logger.info("in charge of fleet %s, listening on %s", config.fleet, config.listen)
    await coordinator.run()


def _cannot(message: str) -> int:
    print(f"{PREFIX}{message}", file=sys.stderr, flush=True)
    return CANNOT_SERVE
