"""Places requests where a router says, and by load alone while none does.

    the router asked so far ──no answer in time──▶ another one that is up ──▶ ... ──▶ LeastLoad

A gateway stays with one router: what that one has decided it knows, what another one decides it
learns with the pods' next reports. Which one is drawn at random, so that gateways spread.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.gateway.placement import LeastLoad, Place
from quire.gateway.routers import NoDecision
from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.gateway.placement import Routed
    from quire.gateway.routers import Replica
    from quire.gateway.worker import Worker
    from quire.proto.router_pb2 import Explanation, RouteReply
    from quire.proto.worker_pb2 import Admission, ModelInfo
    from quire.router.query import RouteQuery
    from quire.telemetry.instruments import Instruments

logger = logging.getLogger(__name__)

MAX_ASKED = 2
"""Routers that a request asks: with their time limits, the longest it waits."""


@dataclass(frozen=True)
class Decision:
    """What one router said. Implements `Decided`."""

    replica: Replica
    reply: RouteReply
    block_size: int

    @property
    def router(self) -> str:
        """Name of the router."""
        return self.replica.name

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens it expects to be cached where the prompt is computed."""
        reply = self.reply
        remote = reply.HasField("prefill_pod")
        blocks = reply.prefill_cached_blocks if remote else reply.decode_cached_blocks
        return blocks * self.block_size

    @property
    def expected_ttft_s(self) -> float:
        """Seconds until the first token, as it expects."""
        return self.reply.expected_ttft_s

    def observe(self, admission: Admission) -> None:
        """Tell the router, unless the prompt was computed elsewhere than it decided."""
        remote = admission.HasField("remote") and not admission.remote.failed
        if remote == self.reply.HasField("prefill_pod"):
            cached = admission.remote.cached_tokens if remote else admission.cached_tokens
            self.replica.observe(self.reply.decision_id, cached)

    async def explain(self) -> Explanation | None:
        """The scores, None when the router does not answer or has forgotten."""
        return await self.replica.explain(self.reply.decision_id)


class RouterPlacement:
    """Asks routers. `run` must be running."""

    def __init__(self, replicas: Sequence[Replica], instruments: Instruments) -> None:
        self._replicas = random.sample(replicas, len(replicas))
        """The one to ask first, then the others."""
        self._least_load = LeastLoad()
        self._has_router = True
        self._routed = instruments.get(m.GATEWAY_PLACEMENTS, "router")
        self._fallbacks = instruments.get(m.GATEWAY_PLACEMENTS, "least_load")
        self._duration = instruments.get(m.GATEWAY_ROUTE_DURATION)
        self._instruments = instruments

    async def run(self) -> None:
        """Keep every router's connection, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for replica in self._replicas:
                group.create_task(replica.run(), name=f"router {replica.name}")

    def show(self) -> None:
        """Routers that answer, and what the one in this process knows."""
        self._instruments.get(m.GATEWAY_ROUTERS_UP).set(sum(r.is_up for r in self._replicas))
        for replica in self._replicas:
            replica.show()

    async def pick(
        self, request: Routed, ready: Sequence[Worker], exclude: frozenset[str]
    ) -> Place:
        """By a router, else by load."""
        model = next((worker.model for worker in ready if worker.model is not None), None)
        place = None
        if model is not None:
            began = time.monotonic()
            place = await self._ask(request.query(model, exclude), model, ready)
            self._duration.observe(time.monotonic() - began)
        if place is None:
            self._fallbacks.inc()
            return self._least_load.choose(ready)
        self._routed.inc()
        return place

    async def _ask(
        self, query: RouteQuery, model: ModelInfo, ready: Sequence[Worker]
    ) -> Place | None:
        for replica in [r for r in self._replicas if r.is_up][:MAX_ASKED]:
            try:
                reply = await replica.route(query)
            except NoDecision as error:
                self._note_failure(error.why.value)
                continue
            self._prefer(replica)
            by_name = {worker.name: worker for worker in ready}
            worker = by_name.get(reply.decode_pod)
            if worker is None:  # another name for it, or a pod that is none of ours
                self._note_failure("unknown_pod")
                logger.debug("router %s chose %s, unknown here", replica.name, reply.decode_pod)
                continue
            prefill = by_name.get(reply.prefill_pod) if reply.HasField("prefill_pod") else None
            return Place(worker, prefill, Decision(replica, reply, model.block_size))
        self._note_none()
        return None

    def _note_failure(self, why: str) -> None:
        self._instruments.get(m.GATEWAY_ROUTE_FAILURES, why).inc()

    def _prefer(self, replica: Replica) -> None:
        """It answered: stay with it."""
        if replica is not self._replicas[0]:
            self._replicas.remove(replica)
            self._replicas.insert(0, replica)
        if not self._has_router:
            self._has_router = True
            logger.info("router %s decides again", replica.name)

    def _note_none(self) -> None:
        if self._has_router:
            self._has_router = False
            logger.warning("no router decides: requests are placed by load until one does")
