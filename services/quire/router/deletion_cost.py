"""Tells Kubernetes which pods a scale-down costs least, by how busy this router sees them.

A ReplicaSet deletes the pods with the lowest cost first; a StatefulSet does not ask. Several
routers say nearly the same, the last word counts. What they say is coarse, so that it seldom
changes: each change is an update of a pod for everybody who watches pods.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from quire.router.endpoint_slices import api_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from quire.router.endpoint_slices import Connect
    from quire.router.fleet import Fleet

logger = logging.getLogger(__name__)

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
PERIOD_S = 30.0
REQUEST_S = 10.0
LEVELS_OF_CACHE = 4
NOT_FOUND = 404


@asynccontextmanager
async def pods_api() -> AsyncIterator[Any]:
    """Of this pod's own account. Raises OSError outside of a cluster."""
    from kubernetes.aio import client

    async with api_client() as api:
        yield client.CoreV1Api(api)


def cost(running: float, wait_s: float, cached_share: float) -> int:
    """0 for an idle pod with an empty cache; work counts by its order of magnitude, before cache.

    `running` are streams, `wait_s` seconds of queued prefill, `cached_share` is between 0 and 1.
    """
    work = math.ceil(math.log2(1 + max(running, 0.0) + max(wait_s, 0.0)))
    return work * (LEVELS_OF_CACHE + 1) + round(LEVELS_OF_CACHE * min(max(cached_share, 0.0), 1.0))


class DeletionCosts:
    """Lives on the event loop of the fleet."""

    def __init__(self, fleet: Fleet, namespace: str, connect: Connect = pods_api) -> None:
        self._fleet, self._namespace, self._connect = fleet, namespace, connect
        self._told: dict[str, int] = {}

    async def run(self) -> None:
        """Until cancelled. Raises OSError outside of a cluster."""
        async with self._connect() as api:
            while True:
                await self.tell(api)
                await asyncio.sleep(PERIOD_S)

    async def tell(self, api: Any) -> None:
        """Of each pod whose cost is another than it was. What fails is tried again next time."""
        import aiohttp
        from kubernetes.aio.client import ApiException

        costs = {pod: cost(*self._fleet.work_of(pod)) for pod in self._fleet.pods}
        self._told = {pod: told for pod, told in self._told.items() if pod in costs}
        for pod, value in costs.items():
            if self._told.get(pod) == value:
                continue
            try:
                async with asyncio.timeout(REQUEST_S):
                    await api.patch_namespaced_pod(pod, self._namespace, _patch(value))
                self._told[pod] = value
            except ApiException as error:
                if error.status != NOT_FOUND:  # it ends, and the fleet will hear of it
                    logger.warning("Kubernetes answers %s to the cost of %s", error.status, pod)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                logger.warning("Kubernetes cannot be told of %s: %s", pod, error or "no answer")
                return


def _patch(value: int) -> Mapping[str, Any]:
    return {"metadata": {"annotations": {ANNOTATION: str(value)}}}
