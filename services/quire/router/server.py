"""The router process: watches its pods, answers `quire.v1.Router`, shows metrics and probes.

Exit codes: 0 after an orderly stop, 2 when it cannot listen (one line on stderr says why).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2_grpc

from quire.cluster.health import HealthService
from quire.cluster.rpc import PLAIN, Cluster
from quire.config.discovery import NO_DISCOVERY
from quire.config.exit_codes import CANNOT_SERVE
from quire.proto import router_pb2_grpc
from quire.router.coordinated import discover
from quire.router.deletion_cost import deletion_costs
from quire.router.endpoint_slices import own_namespace
from quire.router.metrics import set_fleet_gauges
from quire.router.pod_updates import PodUpdates
from quire.router.pods import MAX_MESSAGE_BYTES, watch_pods
from quire.router.readiness_gate import readiness_gates
from quire.router.router import Router
from quire.router.service import RouterService
from quire.telemetry.instruments import new_registry, render
from quire.telemetry.metrics import router_instruments

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from quire.config.cluster import ClusterConfig
    from quire.config.discovery import DiscoveryConfig
    from quire.config.router import RouterConfig

logger = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
"""For questions that are being answered when the process ends."""


@dataclass(frozen=True)
class RouterOptions:
    """What a router process is started with."""

    config: RouterConfig
    listen: str
    """unix:/path or host:port; beyond loopback the cluster has a token."""
    pods: Mapping[str, str]
    """Name -> gRPC address of its worker."""
    cluster: ClusterConfig = PLAIN
    http_port: int = 0
    """Of probes and metrics over HTTP; 0 for none."""
    discovery: DiscoveryConfig = NO_DISCOVERY
    """Who tells of pods beside those in `pods`."""
    deletion_cost: bool = False
    """Tell Kubernetes how busy pods are."""
    readiness_gate: bool = False
    """Tell Kubernetes which pods are routed to."""


async def serve(options: RouterOptions, orphaned: Callable[[], Awaitable[None]]) -> int:
    """Run a router until it is told to stop or `orphaned` returns; returns the exit code."""
    registry = new_registry("router")
    instruments = router_instruments(registry)
    router = Router(options.config, instruments=instruments)

    def page() -> str:
        set_fleet_gauges(instruments, router.fleet, router.clock())
        return render(registry)

    try:
        cluster = Cluster(options.cluster)
        server = cluster.server([("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
        router_pb2_grpc.add_RouterServicer_to_server(RouterService(router), server)
        health = HealthService("quire.v1.Router", lambda: True, lambda: len(router.fleet) > 0)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        cluster.bind(server, options.listen)
        status = _status(options, router, page)
    except OSError as error:
        print(f"quire: error: {error}", file=sys.stderr, flush=True)
        return CANNOT_SERVE
    await server.start()
    logger.info("routing to %d pods, listening on %s", len(options.pods), options.listen)
    pods = discover(options.discovery, options.pods, cluster)
    watching = watch_pods(pods, router.fleet, router.clock, instruments, cluster)
    telling = _telling(options, router)
    try:
        await _until_one_ends(watching, orphaned(), _signalled(), *status, *telling)
    finally:
        health.end()
        await server.stop(STOP_GRACE_S)
    return 0


def _status(
    options: RouterOptions, router: Router, page: Callable[[], str]
) -> list[Coroutine[None, None, None]]:
    """Probes and metrics, if asked for. Raises OSError when the port is taken."""
    if not options.http_port:
        return []
    from quire.cluster.status_server import Status, open_socket, serve_status

    sock = open_socket(options.listen, options.http_port)
    token = options.cluster.cluster_token
    # without a pod a router answers too: that there is none
    status = Status(page, lambda: True, lambda: len(router.fleet) > 0, token)
    return [serve_status(status, sock)]


def _telling(options: RouterOptions, router: Router) -> list[Coroutine[None, None, None]]:
    """What Kubernetes is told of pods. Raises OSError outside of a cluster."""
    wanted = ((options.deletion_cost, deletion_costs), (options.readiness_gate, readiness_gates))
    return [PodUpdates(of(router.fleet, own_namespace())).run() for is_on, of in wanted if is_on]


async def _until_one_ends(*jobs: Awaitable[None]) -> None:
    """Run all; when one has ended, end the others. Raises what it raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _signalled() -> None:
    """Return at SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
