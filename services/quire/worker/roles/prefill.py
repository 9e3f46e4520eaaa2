"""Prefill side: computes prompts for other workers and pushes their blocks while it computes.

Life of a job:

    Prefill rpc   -> transfer opened towards the asking worker, exported request into the engine
    chunk done    -> blocks offered to the transfer (those the other side has already are not)
    prompt done   -> first tokens drawn here, committed with the last block
    Ended         -> the engine lets go of the blocks (they stay in its prefix cache)
    rpc cancelled, deadline, engine failure -> transfer cancelled, request aborted, blocks let go

The blocks are held for the transfer by the engine's `Exports`, beyond the request's own end, until
`Ended` says that no transport reads them any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.api.errors import ApiError
from quire.engine.request import FinishReason
from quire.proto import worker_pb2
from quire.transfer.negotiate import Peer, ref_from_proto
from quire.transfer.state import Ended
from quire.worker import convert

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from quire.engine.engine import Engine
    from quire.engine.loop import EngineLoop
    from quire.engine.output import ChoiceOutput
    from quire.engine.scheduler.remote import BlocksReady
    from quire.transfer.endpoint import Endpoint
    from quire.transfer.state import Event, TransferRef

logger = logging.getLogger(__name__)

PREFIX = "prefill/"
"""Of the engine's ids for jobs, which no session has."""


@dataclass
class _Job:
    """One prompt on its way to another worker."""

    engine_id: str
    ref: TransferRef
    start_block: int
    num_tokens: int
    num_blocks: int = 0
    """Blocks of the prompt, known when its last is computed."""
    first: dict[int, ChoiceOutput] = field(default_factory=dict)
    """First output of each choice."""
    is_committed: bool = False
    """The receiver ends the transfer now, well or not. It may cancel the rpc, having got all,
    before its confirmation is read here: that is no failure."""
    ended: asyncio.Future[worker_pb2.PrefillFailed | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class PrefillRole:
    """Jobs of one worker. Lives on the event loop; called there."""

    def __init__(self, loop: EngineLoop, endpoint: Endpoint) -> None:
        self._loop = loop
        self._endpoint = endpoint
        self._jobs: dict[str, _Job] = {}
        self._by_ref: dict[TransferRef, _Job] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._jobs)

    async def serve(
        self, request: worker_pb2.PrefillRequest
    ) -> AsyncGenerator[worker_pb2.PrefillReply]:
        """The Prefill rpc: accepted, then silence until the job is over."""
        ref = ref_from_proto(request.transfer)
        engine_id = f"{PREFIX}{next(self._numbers)}/{request.request_id}"
        job = _Job(engine_id, ref, request.start_block, len(request.prompt_token_ids))
        try:
            engine_request = convert.export_from(request, engine_id)
        except ApiError as error:
            yield _failed(error)
            return
        self._jobs[engine_id] = self._by_ref[ref] = job
        self._endpoint.send(ref, Peer.from_proto(request.peer))
        self._loop.submit(engine_request)
        try:
            queued = self._loop.state.prefill_tokens
            yield worker_pb2.PrefillReply(accepted=worker_pb2.PrefillAccepted(queued_tokens=queued))
            failed = await asyncio.shield(job.ended)
            if failed is not None:
                yield worker_pb2.PrefillReply(failed=failed)
        finally:
            if not (job.ended.done() or job.is_committed):
                self._endpoint.cancel(ref)
            self._loop.abort(engine_id)

    def on_blocks_ready(self, ready: BlocksReady) -> None:
        """A chunk is computed."""
        job = self._jobs.get(ready.request_id)
        if job is None:
            return
        skipped = max(job.start_block - ready.first_block, 0)
        new = ready.blocks[skipped:]
        if new:
            first = ready.first_block + skipped - job.start_block
            self._endpoint.offer(job.ref, first, new)
        if ready.is_last:
            job.num_blocks = ready.first_block + len(ready.blocks)

    def on_output(self, output: ChoiceOutput) -> None:
        """A first token was drawn, or the request ended without one."""
        job = self._jobs.get(output.request_id)
        if job is None:
            return
        if output.token_ids:
            job.first[output.choice] = output
        if output.finish_reason is FinishReason.ERROR:
            self._give_up(job, ApiError("internal_error", "The model gave no finite number."))
        elif output.finish_reason in (FinishReason.DEADLINE, FinishReason.ABORT):
            self._give_up(job, ApiError("deadline_exceeded", "The prefill was not done in time."))
        elif output.last_of_request:
            self._commit(job)

    def on_rejected(self, engine_id: str, error: ApiError) -> None:
        """The engine refused the job."""
        if (job := self._jobs.get(engine_id)) is not None:
            self._give_up(job, error)

    def on_event(self, event: Event) -> None:
        """The transfer went on."""
        job = self._by_ref.get(event.ref)
        if job is None or not isinstance(event, Ended):
            return
        del self._jobs[job.engine_id], self._by_ref[job.ref]
        if not job.ended.done():
            failed = None
            if event.failure is not None:
                failed = worker_pb2.PrefillFailed(
                    code=worker_pb2.Failure.CODE_INTERNAL, message=f"{event.failure} {event.detail}"
                )
            job.ended.set_result(failed)
        self._loop.abort(job.engine_id)
        self._loop.call(lambda engine: _release(engine, job.engine_id))

    def _commit(self, job: _Job) -> None:
        """Every block is offered and every choice has its token."""
        meta = convert.first_tokens_to(job.first).SerializeToString()
        blocks = job.num_blocks - job.start_block
        job.is_committed = True
        self._endpoint.commit(job.ref, blocks=blocks, tokens=job.num_tokens, meta=meta)

    def _give_up(self, job: _Job, error: ApiError) -> None:
        if not job.ended.done():
            job.ended.set_result(_failed(error).failed)
        self._endpoint.cancel(job.ref)


def _release(engine: Engine, engine_id: str) -> None:
    engine.scheduler.exports.release(engine_id)


def _failed(error: ApiError) -> worker_pb2.PrefillReply:
    failure = convert.failure_to(error, 0, 0)
    return worker_pb2.PrefillReply(
        failed=worker_pb2.PrefillFailed(code=failure.code, message=failure.message)
    )
