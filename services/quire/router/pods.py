"""Keeps one Watch call per pod, and the fleet up to date with what comes over it.

    discovered -> connect -> Watch: model -> snapshot, events, digests, loads -> ...
    out of sync:  the call is made again without a number, which brings a snapshot
    silent:       after `stale_after_s` decisions suspect the pod; after LOST_AFTER_S the call is
                  made again: an aio call to a peer that hangs or was cut off ends on no account
    broken:       no requests for the pod; back off, reconnect, resume where its events were left
    gone, or away for FORGET_AFTER_S: its blocks leave the index

Every call is cancelled when it is left: a dropped grpc.aio call never ends by itself.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from quire.cluster.rpc import Cluster
from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub
from quire.router import convert
from quire.router.follower import Follower, OutOfSync
from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.proto.worker_pb2_grpc import WorkerAsyncStub
    from quire.router.discovery import Discovery
    from quire.router.fleet import Fleet
    from quire.telemetry.instruments import Instruments

logger = logging.getLogger(__name__)

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
LOST_AFTER_S = 5.0
"""A ready pod sends its load every second."""
STARTUP_LOST_AFTER_S = 60.0
"""A loading pod speaks when its phase changes."""
FORGET_AFTER_S = 30.0
MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),  # reconnecting is done here
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)


class _Lost(Exception):
    """The call ended."""


@dataclass(frozen=True)
class Surroundings:
    """What all watchers share."""

    fleet: Fleet
    clock: Callable[[], float]
    instruments: Instruments
    cluster: Cluster


class PodWatcher:
    """One pod, for as long as it is discovered."""

    def __init__(self, pod: str, address: str, shared: Surroundings) -> None:
        self._pod, self._address = pod, address
        self._fleet, self._clock = shared.fleet, shared.clock
        self._cluster, self._instruments = shared.cluster, shared.instruments
        self._events = shared.instruments.get(m.ROUTER_CACHE_EVENTS)
        self._follower: Follower | None = None
        self._backoff = MIN_BACKOFF_S

    async def run(self) -> None:
        """Keep the call until cancelled; then the pod is gone."""
        try:
            async with self._cluster.channel(self._address, CHANNEL_OPTIONS) as channel:
                stub = WorkerStub(channel)
                while True:
                    await self._connection(stub)
        finally:
            self._fleet.lose(self._pod)

    async def _connection(self, stub: WorkerAsyncStub) -> None:
        """One call, from start to end, and the pause after it."""
        connected = self._clock()
        try:
            await self._watch(stub)
        except OutOfSync as error:
            # the pod is well; only its cache has to be told again
            logger.info("pod %s: asking for its cache again (%s)", self._pod, error.reason)
            self._instruments.get(m.ROUTER_RESYNCS, error.reason).inc()
        except (grpc.aio.AioRpcError, _Lost, TimeoutError, ValueError) as error:
            self._fleet.disconnect(self._pod)
            logger.debug("pod %s at %s: %r", self._pod, self._address, error)
        if self._clock() - connected > MAX_BACKOFF_S:
            self._backoff = MIN_BACKOFF_S
        await asyncio.sleep(self._backoff * random.uniform(0.5, 1.0))
        self._backoff = min(2 * self._backoff, MAX_BACKOFF_S)
        self._fleet.forget_silent(self._pod, self._clock(), FORGET_AFTER_S)

    async def _watch(self, stub: WorkerAsyncStub) -> None:
        call = stub.Watch(self._request())
        try:
            limit = STARTUP_LOST_AFTER_S
            while True:
                async with asyncio.timeout(limit):
                    update = await call.read()
                if not isinstance(update, worker_pb2.WorkerUpdate):  # end of stream
                    raise _Lost
                self._take(update)
                if self._follower is not None:
                    limit = LOST_AFTER_S
        finally:
            call.cancel()

    def _request(self) -> worker_pb2.WatchRequest:
        """Resume where the events were left, unless they have to come from the beginning."""
        request = worker_pb2.WatchRequest(cache_events=True)
        known = self._fleet.pods.get(self._pod)
        follower = self._follower
        if follower is not None and follower.pod is known and follower.sequence is not None:
            request.incarnation = follower.pod.incarnation
            request.after_sequence = follower.sequence
        return request

    def _take(self, update: worker_pb2.WorkerUpdate) -> None:
        now, kind = self._clock(), update.WhichOneof("update")
        if kind == "model":
            pod = self._fleet.connect(convert.model_from(self._pod, update.model), now)
            if self._follower is None or self._follower.pod is not pod:
                self._follower = Follower(self._fleet, pod)
        follower = self._follower
        if follower is None:
            return  # loading
        self._fleet.hear(self._pod, now)
        if kind == "load":
            self._fleet.report(self._pod, convert.load_from(update.load), now)
            if follower.sequence is not None:
                follower.check_trust()
        elif kind == "cache_events":
            self._events.inc(len(update.cache_events.events))
            follower.take(update.cache_events)
        elif kind == "cache_digest" and follower.check(update.cache_digest):
            self._backoff = MIN_BACKOFF_S


async def watch_pods(
    discovery: Discovery,
    fleet: Fleet,
    clock: Callable[[], float],
    instruments: Instruments,
    cluster: Cluster | None = None,
) -> None:
    """Watch every discovered pod until cancelled."""
    shared = Surroundings(fleet, clock, instruments, cluster or Cluster())
    tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
    async with asyncio.TaskGroup() as group:
        async for pods in discovery.watch():
            wanted = set(pods.items())
            for key in tasks.keys() - wanted:
                gone = tasks.pop(key)
                gone.cancel()
                # its clean-up must not hit the pod's next watcher
                await asyncio.wait([gone])
            for pod, address in wanted - tasks.keys():
                watcher = PodWatcher(pod, address, shared)
                tasks[pod, address] = group.create_task(watcher.run())
