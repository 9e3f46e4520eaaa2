"""A Ray Serve application that carries no request: it says whether the fleet serves.

    DEPLOYING ──▶ all pods of every pool are ready ──▶ RUNNING
    RUNNING ──▶ a pool has none that is ready, or nobody can say: three times ──▶ UNHEALTHY
    UNHEALTHY ──▶ its replica is started again, and waits as at first ──▶ RUNNING

KubeRay's RayService reads nothing else of a cluster, and sends clients to a new one when the
application there is RUNNING. The coordinator is asked as `quire status` asks it, with the same
variables of the environment. Nothing else of Quire imports ray.serve.
"""

from __future__ import annotations

import asyncio
import logging
import os

from ray import serve

from quire.cluster.rpc import Cluster
from quire.config.cluster import ClusterConfig
from quire.config.flags import Command, parse
from quire.config.fleet_client import FleetClientConfig
from quire.coordinator.client import CoordinatorClient, CoordinatorError
from quire.coordinator.fleet_health import NotServing, why_not_complete, why_not_serving

logger = logging.getLogger("ray.serve")
"""Where Ray Serve keeps what a replica has to say."""

POLL_S = 1.0
CHECK_S, CHECK_TIMEOUT_S = 5.0, 30.0
_OPTIONS = Command(
    prog="quire.coordinator.serve_app",
    summary="",
    owners=(FleetClientConfig, ClusterConfig),
    reads_environment=True,
)


@serve.deployment(
    health_check_period_s=CHECK_S,
    health_check_timeout_s=CHECK_TIMEOUT_S,
    ray_actor_options={"num_cpus": 0},
)
class Fleet:
    """Is made when the fleet is complete."""

    async def __init__(self) -> None:  # type: ignore[misc] # Ray Serve awaits it
        options = parse(_OPTIONS, (), os.environ)
        address = options.get(FleetClientConfig).coordinator
        self._client = CoordinatorClient(address, Cluster(options.get(ClusterConfig)))
        said = ""
        while missing := await self._missing_at_first():
            if missing != said:
                logger.info("waiting: %s", said := missing)
            await asyncio.sleep(POLL_S)

    async def _missing_at_first(self) -> str:
        try:
            return why_not_complete(await self._client.status())
        except CoordinatorError as error:
            return str(error)

    async def check_health(self) -> None:
        """Asked by Ray Serve. Raises NotServing, and CoordinatorError where nobody answers."""
        if problem := why_not_serving(await self._client.status()):
            raise NotServing(problem)


app = Fleet.bind()
