"""Decode side: asks another worker for a prompt's blocks, and takes them into its own pool.

Life of a prompt:

    admitted by the engine (seat, cached prefix, promise)  -> on_prefill_needed
    too little is missing            -> computed here
    Prefill rpc + transfer           -> blocks bound in windows, granted, delivered as they verify
    Ended with a commit              -> the request runs, its first tokens came with the commit
    Ended with a failure, rpc failed -> what was verified is kept, the rest is computed here
    aborted, expired                 -> `fence`: after it nobody writes into its blocks

The engine owns the blocks; the endpoint writes into those that were granted; this module carries
messages between the two and the other worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from quire.proto import worker_pb2
from quire.transfer.negotiate import ref_to_proto
from quire.transfer.state import Delivered, Ended
from quire.worker import convert
from quire.worker.roles.course import Course

if TYPE_CHECKING:
    from quire.engine.engine import Engine
    from quire.engine.loop import EngineLoop
    from quire.engine.output import RemoteTimes
    from quire.engine.scheduler.remote import PrefillNeeded
    from quire.transfer.endpoint import Endpoint
    from quire.transfer.negotiate import Peer
    from quire.transfer.state import Commit, Event, TransferRef
    from quire.worker.roles.peers import Peers

logger = logging.getLogger(__name__)

WINDOW_BLOCKS = 64
"""Blocks bound ahead of what was delivered: two chunks of 512 tokens."""
MIN_REMOTE_BLOCKS = 2
"""Fewer missing blocks than this are computed here: asking would take longer."""
ACCEPT_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Prompt:
    """A prompt that another worker computes. Implements the engine's `RemotePrompt`."""

    role: DecodeRole
    submit: worker_pb2.Submit
    request_id: str
    start_block: int = 0
    num_blocks: int = 0
    ref: TransferRef | None = None
    num_bound: int = 0
    delivered: set[int] = field(default_factory=set)
    num_leading: int = 0
    """Leading blocks of the transfer that are all delivered."""
    task: asyncio.Task[None] | None = None
    course: Course = field(default_factory=Course)

    def times(self, scheduled: float, first_token: float) -> RemoteTimes | None:
        """On the engine thread, with the first token: what the time until then was spent on."""
        return self.course.times(self.submit.prefill.worker, scheduled, first_token)

    def fence(self) -> None:
        """On the engine thread: return when nobody writes into the request's blocks any more."""
        if self.ref is not None:
            self.role.fence(self)


class DecodeRole:
    """Prompts of one worker. Lives on the event loop; `fence` alone is called elsewhere."""

    def __init__(self, loop: EngineLoop, endpoint: Endpoint, peer: Peer, peers: Peers) -> None:
        self._loop = loop
        self._peers = peers
        self._endpoint = endpoint
        self._peer = peer
        self._asyncio = asyncio.get_running_loop()
        self._prompts: dict[TransferRef, Prompt] = {}

    def prompt(self, request_id: str, submit: worker_pb2.Submit) -> Prompt | None:
        """The request's prompt, if it may be computed elsewhere. Log-probabilities of prompts are
        computed where the answer is; a resumed request finds its prompt in the cache, mostly."""
        scored = submit.sampling.HasField("prompt_logprobs")
        if not submit.HasField("prefill") or submit.resumed or scored:
            return None
        return Prompt(self, submit, request_id)

    def on_prefill_needed(self, needed: PrefillNeeded) -> None:
        """The engine admitted a prompt and waits."""
        prompt = needed.remote
        assert isinstance(prompt, Prompt)
        prompt.start_block, prompt.num_blocks = needed.start_block, needed.num_blocks
        missing = needed.num_blocks - needed.start_block
        if missing < MIN_REMOTE_BLOCKS:
            self._fall_back(prompt)
            return
        prompt.ref = self._endpoint.receive(missing)
        self._prompts[prompt.ref] = prompt
        self._bind(prompt)
        prompt.task = self._asyncio.create_task(self._ask(prompt, prompt.ref))

    def on_event(self, event: Event) -> None:
        """The transfer went on."""
        prompt = self._prompts.get(event.ref)
        if prompt is None:
            return
        if isinstance(event, Delivered):
            self._deliver(prompt, event.block)
        elif isinstance(event, Ended):
            self._drop(prompt)
            prompt.course.ended = time.monotonic()
            prompt.course.first = first = _first_tokens(prompt, event.commit)
            if first is None:
                why = f"{event.failure} {event.detail}" if event.failure else "of another prompt"
                logger.warning(
                    "prefill of %s by %s failed (%s): computing the rest here",
                    prompt.submit.request_id, prompt.submit.prefill.worker, why,
                )  # fmt: skip
                self._fall_back(prompt)
            else:
                self._loop.complete_remote(prompt.request_id, convert.drawn_from(first))

    def fence(self, prompt: Prompt) -> None:
        """See `Prompt.fence`."""
        assert prompt.ref is not None
        self._endpoint.fence(prompt.ref)
        self._asyncio.call_soon_threadsafe(self._drop, prompt)

    def close(self) -> None:
        """Ask for nothing any more."""
        for prompt in list(self._prompts.values()):
            self._drop(prompt)

    # ----

    async def _ask(self, prompt: Prompt, ref: TransferRef) -> None:
        """The Prefill rpc. If it ends before the transfer does, the other worker gave up."""
        submit = prompt.submit
        request = worker_pb2.PrefillRequest(
            request_id=submit.request_id,
            prompt_token_ids=submit.prompt_token_ids,
            sampling=submit.sampling,
            priority=submit.priority,
            cache_salt=submit.cache_salt,
            start_block=prompt.start_block,
            transfer=ref_to_proto(ref),
            peer=self._peer.to_proto(),
        )
        if submit.HasField("timeout_ms"):
            request.timeout_ms = submit.timeout_ms
        call = self._peers.stub(submit.prefill.address).Prefill(request)
        try:
            async with asyncio.timeout(ACCEPT_TIMEOUT_S):
                reply = await call.read()
            prompt.course.accepted = time.monotonic()
            while isinstance(reply, worker_pb2.PrefillReply):
                if reply.HasField("failed"):
                    logger.info("prefill of %s: %s", submit.request_id, reply.failed.message)
                    break
                reply = await call.read()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            logger.info("prefill of %s: %s", submit.request_id, type(error).__name__)
        finally:
            call.cancel()
        # The stream ends in good order only after the transfer has: what is still open has failed,
        # and need not wait for its lease.
        self._endpoint.cancel(ref)

    def _bind(self, prompt: Prompt) -> None:
        """Have the engine turn promised blocks into slots, up to a window ahead."""
        total = prompt.num_blocks - prompt.start_block
        count = min(prompt.num_leading + WINDOW_BLOCKS, total) - prompt.num_bound
        if count <= 0:
            return
        first = prompt.num_bound
        prompt.num_bound += count

        def bind(engine: Engine) -> None:
            assert prompt.ref is not None
            slots = engine.scheduler.remote.bind(prompt.request_id, count)
            if slots:
                self._endpoint.grant(prompt.ref, first, slots)
            else:
                # It ended before there was a transfer to fence: nobody else would end this one.
                self._endpoint.cancel(prompt.ref)

        self._loop.call(bind)

    def _deliver(self, prompt: Prompt, block: int) -> None:
        prompt.delivered.add(block)
        prompt.course.note_arrival()
        leading = prompt.num_leading
        while leading in prompt.delivered:
            leading += 1
        if leading == prompt.num_leading:
            return
        prompt.num_leading = leading
        num_blocks = prompt.start_block + leading
        request_id = prompt.request_id
        self._loop.call(lambda engine: engine.scheduler.remote.deliver(request_id, num_blocks))
        self._bind(prompt)

    def _fall_back(self, prompt: Prompt) -> None:
        request_id = prompt.request_id
        self._loop.call(lambda engine: engine.scheduler.remote.fall_back(request_id))

    def _drop(self, prompt: Prompt) -> None:
        if prompt.ref is not None:
            self._prompts.pop(prompt.ref, None)
        if prompt.task is not None:
            prompt.task.cancel()


def _first_tokens(prompt: Prompt, commit: Commit | None) -> worker_pb2.FirstTokens | None:
    """What came with a commit; None unless it is of the whole prompt, with a token per choice."""
    if commit is None or commit.blocks != prompt.num_blocks - prompt.start_block:
        return None
    first = worker_pb2.FirstTokens.FromString(commit.meta)
    return first if len(first.choices) == (prompt.submit.sampling.n or 1) else None
