"""Writes into Kubernetes' pods what a router knows of them: each thing once, until it changes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.router.endpoint_slices import api_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from quire.router.endpoint_slices import Connect

logger = logging.getLogger(__name__)

REQUEST_S = 10.0
NOT_FOUND = 404


@asynccontextmanager
async def pods_api() -> AsyncIterator[Any]:
    """Of this pod's own account. Raises OSError outside of a cluster."""
    from kubernetes.aio import client

    async with api_client() as api:
        yield client.CoreV1Api(api)


@dataclass(frozen=True)
class Update:
    """A kind of thing that pods are told."""

    what: str
    """Its name, in a warning."""
    values: Callable[[], Mapping[str, int]]
    """Pod -> what is to be told of it now."""
    patch: Callable[[Any, str, int], Awaitable[object]]
    """Tells one pod by the API of pods."""
    period_s: float


class PodUpdates:
    """One kind of update of all pods; lives on the event loop of what it asks for values."""

    def __init__(self, update: Update, connect: Connect = pods_api) -> None:
        self._update, self._connect = update, connect
        self._told: dict[str, int] = {}

    async def run(self) -> None:
        """Until cancelled. Raises OSError outside of a cluster."""
        async with self._connect() as api:
            while True:
                await self.tell(api)
                await asyncio.sleep(self._update.period_s)

    async def tell(self, api: Any) -> None:
        """Each pod whose value is another than it was. What fails is tried again next time."""
        import aiohttp
        from kubernetes.aio.client import ApiException

        what, values = self._update.what, self._update.values()
        self._told = {pod: told for pod, told in self._told.items() if pod in values}
        for pod, value in values.items():
            if self._told.get(pod) == value:
                continue
            try:
                async with asyncio.timeout(REQUEST_S):
                    await self._update.patch(api, pod, value)
                self._told[pod] = value
            except ApiException as error:
                if error.status != NOT_FOUND:  # it ends, and the fleet will hear of it
                    logger.warning("Kubernetes answers %s to the %s of %s", error.status, what, pod)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                logger.warning("Kubernetes cannot be told of %s: %s", pod, error or "no answer")
                return
