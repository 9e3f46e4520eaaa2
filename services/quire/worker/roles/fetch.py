"""Requests that come from another worker bring their KV blocks along, where that works.

Life of a request with a source:

    Submit{source} -> what its tokens lack here of full blocks is asked for, by hash (Fetch)
                   -> the blocks that are found there arrive in fresh blocks of the pool
    Ended          -> they are registered as cached prefix, and the request is submitted: it finds
                      them there and computes the rest, at most a block if everything came
    anything fails -> the request is submitted all the same, and computes what is missing

So a fetch can make a request faster and nothing else. All choices of a request are fetched at once,
what they share only once. An abort meanwhile ends the fetch and is carried out behind the submit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from quire.api import block_hash
from quire.engine.scheduler.handover import Link
from quire.proto import worker_pb2
from quire.transfer.negotiate import ref_to_proto
from quire.transfer.state import Delivered, Ended
from quire.worker.roles.engine_calls import on_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.engine.engine import Engine
    from quire.engine.loop import EngineLoop
    from quire.engine.request import EngineRequest
    from quire.transfer.endpoint import Endpoint
    from quire.transfer.negotiate import Peer
    from quire.transfer.state import Event, TransferRef
    from quire.worker.metrics import EngineMetrics
    from quire.worker.roles.peers import Peers

logger = logging.getLogger(__name__)

MIN_BLOCKS = 2
"""Fewer missing blocks than this are computed here: asking would take longer."""
ANSWER_TIMEOUT_S = 5.0
TRANSFER_TIMEOUT_S = 30.0
"""However well it goes on: a request waits no longer for what it can compute."""


@dataclass(eq=False)
class _Job:
    """A request on its way in."""

    key: str
    request: EngineRequest
    source: worker_pb2.WorkerRef
    name: str
    """The request's id for logs, the same everywhere."""
    aborts: list[int | None] = field(default_factory=list)
    """What was aborted meanwhile: choices, or None for all of it."""
    ref: TransferRef | None = None
    slots: list[tuple[Link, int]] = field(default_factory=list)
    """Blocks taken here, in the order of the transfer once that is known."""
    delivered: list[int] = field(default_factory=list)
    ended: asyncio.Future[Ended] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def is_wanted(self) -> bool:
        """Nobody aborted all of it."""
        return None not in self.aborts


class FetchRole:
    """Requests of one worker that come from others. Lives on the event loop."""

    def __init__(
        self, loop: EngineLoop, endpoint: Endpoint, me: Peer, peers: Peers, metrics: EngineMetrics
    ) -> None:
        self._loop = loop
        self._endpoint = endpoint
        self._me = me
        self._peers = peers
        self._metrics = metrics
        self._jobs: dict[str, _Job] = {}
        self._by_ref: dict[TransferRef, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()

    def submit(self, request: EngineRequest, submit: worker_pb2.Submit) -> None:
        """Fetch what `submit.source` has of the request's blocks, then hand it to the engine."""
        key = f"arriving/{next(self._numbers)}"
        job = _Job(key, request, submit.source, submit.request_id)
        self._jobs[request.request_id] = job
        task = asyncio.create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abort(self, request_id: str, choice: int | None) -> bool:
        """Whether the request is on its way in: its abort is carried out later then."""
        job = self._jobs.get(request_id)
        if job is None:
            return False
        job.aborts.append(choice)
        if choice is None and job.ref is not None:
            self._endpoint.cancel(job.ref)
        return True

    def on_event(self, event: Event) -> None:
        """The transfer went on."""
        job = self._by_ref.get(event.ref)
        if job is None:
            return
        if isinstance(event, Delivered):
            job.delivered.append(event.block)
        elif isinstance(event, Ended):
            del self._by_ref[event.ref]
            job.ended.set_result(event)

    async def close(self) -> None:
        """The engine stops: nothing is submitted any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ----

    async def _run(self, job: _Job) -> None:
        try:
            await self._fetch(job)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            name = type(error).__name__
            logger.info("no blocks for %s from %s: %s", job.name, job.source.worker, name)
        await self._end_transfer(job)
        arrived = [job.slots[block] for block in job.delivered]
        del self._jobs[job.request.request_id]

        def settle(engine: Engine) -> None:
            engine.scheduler.handover.register(arrived)
            engine.scheduler.handover.release(job.key)
            if job.is_wanted:
                self._metrics.moved_here(job.request, len(arrived))

        self._loop.call(settle)
        self._loop.submit(job.request)
        for choice in job.aborts:
            self._loop.abort(job.request.request_id, choice)

    async def _fetch(self, job: _Job) -> None:
        chain = await asyncio.to_thread(_chain, self._loop.engine, job.request)
        job.slots = await on_engine(
            self._loop, lambda engine: engine.scheduler.handover.prepare(job.key, chain)
        )
        if len(job.slots) < MIN_BLOCKS or not job.is_wanted:
            return
        job.ref = self._endpoint.receive(len(job.slots))
        self._by_ref[job.ref] = job
        request = worker_pb2.FetchRequest(
            request_id=job.name,
            block_hashes=b"".join(link.block_hash for link, _ in job.slots),
            transfer=ref_to_proto(job.ref),
            peer=self._me.to_proto(),
        )
        call = self._peers.stub(job.source.address).Fetch(request)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reply = await call.read()
            if not isinstance(reply, worker_pb2.FetchReply) or not reply.found:
                return
            job.slots = [job.slots[place] for place in reply.found if place < len(job.slots)]
            self._endpoint.grant(job.ref, 0, [slot for _, slot in job.slots])
            async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                ended = await asyncio.shield(job.ended)
            if ended.failure is not None:
                logger.warning(
                    "fetch of %s from %s failed (%s %s): computing the rest here",
                    job.name, job.source.worker, ended.failure, ended.detail,
                )  # fmt: skip
        finally:
            call.cancel()

    async def _end_transfer(self, job: _Job) -> None:
        """Nobody writes into the job's blocks afterwards."""
        if job.ref is not None and not job.ended.done():
            self._endpoint.cancel(job.ref)
            await job.ended  # the endpoint says it of every transfer, at once after a cancel


def _chain(engine: Engine, request: EngineRequest) -> list[Link]:
    """The full blocks of the request's tokens, except the one of a choice's last token, whose
    logits are needed: it is computed in any case."""
    return list(_links(engine, request)) if request.params.prompt_logprobs is None else []


def _links(engine: Engine, request: EngineRequest) -> Iterator[Link]:
    root = block_hash.root(engine.model.fingerprint, salt=request.cache_salt)
    for output in request.resumed.values() or [[]]:
        tokens = request.prompt_token_ids + output
        hashes = block_hash.extend(root, tokens[:-1])
        yield from map(Link, hashes, [root, *hashes])
