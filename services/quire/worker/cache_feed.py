"""What one reader of the prefix cache's events gets: a snapshot or deltas, and digests.

first, or when events it lacks are no longer kept   snapshot, in parts
then                                                events, numbered without gaps
every few seconds                                   digest, to compare its own with
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from quire.proto import worker_pb2
from quire.worker import convert
from quire.worker.roles.engine_calls import on_engine

if TYPE_CHECKING:
    from quire.engine.engine import Engine
    from quire.engine.loop import EngineLoop

PART_BLOCKS = 4096
"""Events in one message: 200 KB, far below gRPC's limit of 4 MiB."""
DIGEST_PERIOD_S = 5.0
ENGINE_CALL_TIMEOUT_S = 30.0


class CacheFeed:
    """One reader's position in one engine's cache events."""

    def __init__(self, incarnation: int, request: worker_pb2.WatchRequest) -> None:
        self._incarnation = incarnation
        resumes = request.incarnation == incarnation
        self._sequence = request.after_sequence if resumes else -1
        self._next_digest = 0.0

    async def updates(self, loop: EngineLoop) -> list[worker_pb2.WorkerUpdate]:
        """What happened since the last call. TimeoutError when the engine does not answer."""
        return await on_engine(loop, self._collect, ENGINE_CALL_TIMEOUT_S)

    def _collect(self, engine: Engine) -> list[worker_pb2.WorkerUpdate]:
        """On the engine thread, between two steps: events and digest are of the same moment."""
        pool = engine.pool
        ahead = self._sequence > pool.event_sequence  # never sent by us: do not believe it
        events = None if self._sequence < 0 or ahead else pool.events_since(self._sequence)
        self._sequence = pool.event_sequence
        if events is None:
            snapshot = convert.stored_events(pool.snapshot())
            parts = self._parts(snapshot, pool.event_sequence, snapshot=True)
        elif events:
            converted = [convert.cache_event_to(event) for event in events]
            parts = self._parts(converted, events[0].sequence, snapshot=False)
        else:
            parts = []
        updates = [worker_pb2.WorkerUpdate(cache_events=part) for part in parts]
        if (now := time.monotonic()) >= self._next_digest:
            self._next_digest = now + DIGEST_PERIOD_S
            digest = convert.cache_digest_to(pool.digest(), self._incarnation)
            updates.append(worker_pb2.WorkerUpdate(cache_digest=digest))
        return updates

    def _parts(
        self, events: list[worker_pb2.CacheEvent], first: int, *, snapshot: bool
    ) -> list[worker_pb2.CacheEvents]:
        return [
            worker_pb2.CacheEvents(
                incarnation=self._incarnation,
                first_sequence=first if snapshot else first + start,
                events=events[start : start + PART_BLOCKS],
                snapshot=snapshot,
                more=snapshot and start + PART_BLOCKS < len(events),
            )
            for start in range(0, max(len(events), 1), PART_BLOCKS)
        ]
