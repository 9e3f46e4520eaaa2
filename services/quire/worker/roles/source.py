"""Hands cached blocks to other workers: what a request that moves leaves behind here.

Life of a job:

    Fetch rpc -> the blocks that are here are held, told, and pushed at once: nothing is computed
    Ended     -> they are held no longer, nor is what was parked for the request
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.api.block_hash import BLOCK_SIZE, HASH_BYTES
from quire.proto import worker_pb2
from quire.transfer.negotiate import Peer, ref_from_proto
from quire.transfer.state import Ended
from quire.worker.roles.engine_calls import on_engine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from quire.engine.loop import EngineLoop
    from quire.transfer.endpoint import Endpoint
    from quire.transfer.state import Event, TransferRef

PARK_S = 5.0
"""How long the blocks of a request that moves stay held for the worker that it goes to."""


def parked(request_id: str) -> str:
    """Name of the hold for a request that moved."""
    return f"parked/{request_id}"


@dataclass(eq=False)
class _Job:
    """Blocks on their way to another worker."""

    key: str
    request_id: str
    ended: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class SourceRole:
    """Jobs of one worker. Lives on the event loop."""

    def __init__(self, loop: EngineLoop, endpoint: Endpoint) -> None:
        self._loop = loop
        self._endpoint = endpoint
        self._jobs: dict[TransferRef, _Job] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._jobs)

    async def serve(
        self, request: worker_pb2.FetchRequest
    ) -> AsyncGenerator[worker_pb2.FetchReply]:
        """The Fetch rpc. Raises TimeoutError when the engine does not answer."""
        data = request.block_hashes
        hashes = [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]
        ref = ref_from_proto(request.transfer)
        job = _Job(f"fetch/{next(self._numbers)}", request.request_id)
        try:
            found = await on_engine(
                self._loop, lambda engine: engine.scheduler.handover.find(job.key, hashes)
            )
            yield worker_pb2.FetchReply(found=[place for place, _ in found])
            if found:
                await self._send(job, ref, Peer.from_proto(request.peer), [b for _, b in found])
        finally:
            if ref in self._jobs:
                self._endpoint.cancel(ref)  # Ended lets go of the blocks
            else:
                self._release(job)

    def on_event(self, event: Event) -> None:
        """The transfer went on."""
        if isinstance(event, Ended) and (job := self._jobs.pop(event.ref, None)) is not None:
            if not job.ended.done():
                job.ended.set_result(None)
            self._release(job)

    async def _send(self, job: _Job, ref: TransferRef, peer: Peer, blocks: list[int]) -> None:
        self._jobs[ref] = job
        self._endpoint.send(ref, peer)
        self._endpoint.offer(ref, 0, blocks)
        self._endpoint.commit(ref, blocks=len(blocks), tokens=len(blocks) * BLOCK_SIZE)
        await asyncio.shield(job.ended)

    def _release(self, job: _Job) -> None:
        def release(key: str) -> None:
            self._loop.call(lambda engine: engine.scheduler.handover.release(key))

        release(job.key)
        release(parked(job.request_id))
