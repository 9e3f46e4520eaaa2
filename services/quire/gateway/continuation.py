"""A request that outlives its workers.

    start ──▶ with a worker ──every choice ended──▶ over
                │      ▲
     lost, hung,│      │ attempt + 1: prompt and journal, same seed, what is left of the deadline
     refused ...▼      │
              moving: at once if another worker is ready, else when one is; bounded ──▶ failed

Each send is an attempt of its own. What an earlier attempt still says is dropped: its tokens by
the journal, its end because it is no longer the current one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quire.api import block_hash
from quire.api.errors import ApiError
from quire.gateway.journal import Journal, Verdict
from quire.gateway.trace import Trace
from quire.gateway.worker import LOSSES, Loss, failure_error, worker_lost
from quire.proto import common_pb2
from quire.router.query import RouteQuery

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from quire.gateway.placement import Place
    from quire.gateway.replies import Replies
    from quire.gateway.trace import PromptTrace
    from quire.gateway.worker import Worker
    from quire.proto.worker_pb2 import Admission, ChoiceOutput, Failure, ModelInfo, Submit

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0
"""Before asking again a worker that has refused, when there is no other."""
UNCOUNTED = frozenset({Loss.NOT_READY, Loss.OVERLOADED, Loss.DRAINING})
"""Not the request's doing: where it has tokens already, only time bounds how often they happen."""
TYPICAL_OUTPUT = 256
"""Tokens of a choice that has no smaller limit, for want of anything better."""
MAX_TOTAL = 10
"""Resubmissions of a request in all, as a multiple of those allowed in a row."""


@dataclass(frozen=True)
class Patience:
    """How hard to try to go on with a request."""

    max_resubmissions: int = 3
    """In a row, without a new token in between."""
    wait_s: float = 60.0
    """For a worker to become ready, without a new token."""


class Workplace(Protocol):
    """Where a request finds its workers."""

    patience: Patience

    async def pick(self, run: Continuation) -> Place | None:
        """Workers for the request, None when none was ready. Takes a bounded time."""

    def has_untried(self, run: Continuation) -> bool:
        """A worker is ready that has not failed this request since its last token."""

    async def changed(self) -> None:
        """Return when a worker has become ready, or is so no more."""

    def spawn(self, job: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a job, at the longest until the gateway ends."""

    def resubmitted(self, loss: Loss, same_bits: bool) -> None:
        """A request goes on somewhere, if not `same_bits` where kernels round otherwise."""


class Continuation:
    """One request: its journal, and the worker it is with."""

    def __init__(
        self,
        submit: Submit,
        replies: Replies,
        index: int,
        workplace: Workplace,
        trace: PromptTrace | None = None,
    ) -> None:
        self.journal = Journal(submit)
        self.trace = trace or Trace().prompt()
        self.tried: set[str] = set()
        """Names of the workers that failed the request since its last token."""
        self.fingerprint: bytes | None = None
        """Of the model that the first tokens came from; no other can go on with them."""
        self._numerics: str | None = None
        """What decided the bits of the first token."""
        self._replies = replies
        self._index = index
        self._workplace = workplace
        self._attempt: _Attempt | None = None
        self._place: Place | None = None
        self._source: Worker | None = None
        """The worker that the request leaves in good order: its blocks can be fetched there."""
        self._moving: asyncio.Task[None] | None = None
        self._loss = Loss.NOT_READY
        self._error = worker_lost()
        self._failures = 0  # in a row
        self._since: float | None = None  # of the first of them, time.monotonic()

    def query(self, model: ModelInfo, exclude: frozenset[str]) -> RouteQuery:
        """What a router needs to know. Hashes the prompt, and what was said since."""
        submit, journal = self.journal.submit, self.journal
        tokens = journal.longest
        fingerprint = self.fingerprint or model.fingerprint
        root = block_hash.root(fingerprint, salt=submit.cache_salt)
        left = submit.sampling.max_tokens - (len(tokens) - len(submit.prompt_token_ids))
        return RouteQuery(
            hashes=b"".join(block_hash.extend(root, tokens)),
            prompt_len=len(tokens),
            model=model.model,
            expected_output=min(max(left, 1), TYPICAL_OUTPUT) * max(len(journal.open), 1),
            priority=submit.priority,
            deadline_s=self._time_left(),
            request_id=submit.request_id,
            exclude=exclude,
        )

    def agrees_with(self, worker: Worker) -> bool:
        """Going on there gives the tokens that would have come without a loss, as far as known."""
        model = worker.model
        return self._numerics is None or model is None or model.numerics == self._numerics

    def start(self) -> None:
        """Send the request, or wait for a worker to send it to."""
        self._go(0.0)

    def abort(self, choice: int | None = None) -> None:
        """Nothing more of the request, or of one choice, is wanted."""
        if choice is not None:
            self.journal.open.discard(choice)
        if self._attempt is not None:
            self._attempt.worker.abort(self._attempt.number, choice)
        if choice is None:
            self._attempt = None
            if self._moving is not None:
                self._moving.cancel()

    # ---- from the attempts

    def deliver(self, output: ChoiceOutput) -> None:
        """A worker said something; what is new of it goes to the client."""
        journal = self.journal
        verdict = journal.judge(output)
        if verdict is Verdict.GAP:
            self._leave(Loss.GAP)
        elif verdict is Verdict.ACCEPT:
            aborted = output.finish_reason == common_pb2.FINISH_REASON_ABORT
            if aborted:
                output.ClearField("finish_reason")
            if output.HasField("admission"):
                self._note_admission(output.admission)
            journal.take(output)
            if output.token_ids:
                self._note_numerics()
                self._failures, self._since = 0, None
                self.tried.clear()
                self._source = None
            self._replies.deliver(self._index, output)
            if not journal.open:
                self._end()
            elif aborted:
                self._leave(Loss.ABORTED)

    def refused(self, attempt: _Attempt, failure: Failure) -> None:
        """The worker of the current attempt will not go on."""
        if attempt is not self._attempt:
            return
        loss = LOSSES.get(failure.code)
        if loss is None:
            self._fail(failure_error(failure))
            return
        self._error = failure_error(failure)
        self.tried.add(attempt.worker.name)
        fresh = not self.journal.num_tokens
        if loss is Loss.OVERLOADED and fresh and not self._workplace.has_untried(self):
            self._fail(self._error)  # the client is the one to come back later
        else:
            self._go_on(loss)

    def lost(self, attempt: _Attempt, loss: Loss) -> None:
        """The worker of the current attempt is not to be relied on any more."""
        if attempt is self._attempt:
            self._source = attempt.worker if loss is Loss.DRAINING else None
            self._error = worker_lost()
            self.tried.add(attempt.worker.name)
            self._go_on(loss)

    # ---- moving

    def _leave(self, loss: Loss) -> None:
        """The worker does not do what it should: take the request away from it."""
        attempt = self._attempt
        if attempt is not None:
            attempt.worker.abort(attempt.number)
            self.lost(attempt, loss)

    def _go_on(self, loss: Loss) -> None:
        """The current attempt is over; make another."""
        eos = self._attempt.eos_token_ids if self._attempt is not None else ()
        self._attempt, self._loss = None, loss
        self.trace.left(loss.value)
        for ending in self.journal.endings(eos):
            self.journal.take(ending)
            self._replies.deliver(self._index, ending)
        if not self.journal.open:
            self._end()
            return
        if self._is_hopeless(loss):
            self._fail(self._error)
            return
        self.journal.attempt += 1
        self._go(0.0 if self._workplace.has_untried(self) else self._backoff())

    def _is_hopeless(self, loss: Loss) -> bool:
        """Whether trying was enough. Notes one more failure."""
        now, patience = time.monotonic(), self._workplace.patience
        if self._since is None:
            self._since = now
        if loss not in UNCOUNTED or not self.journal.num_tokens:
            self._failures += 1
        return (
            self._failures > patience.max_resubmissions
            or self.journal.attempt >= patience.max_resubmissions * MAX_TOTAL
            or now - self._since > patience.wait_s
        )

    def _backoff(self) -> float:
        doubled = FIRST_BACKOFF_S * 2.0 ** max(self._failures - 1, 0)
        return min(doubled, MAX_BACKOFF_S) * random.uniform(0.5, 1.0)

    def _go(self, delay_s: float) -> None:
        """Send the request in a task of its own: a router may have to be asked."""
        self._moving = self._workplace.spawn(self._move(delay_s))
        self._moving.add_done_callback(self._gone)

    def _gone(self, moving: asyncio.Task[None]) -> None:
        if not moving.cancelled() and (error := moving.exception()) is not None:
            logger.error("request %s cannot be placed", self.journal.submit.request_id,
                         exc_info=error)  # fmt: skip
            message = "The server had an error while processing the request."
            self._fail(ApiError("internal_error", message))

    async def _move(self, delay_s: float) -> None:
        """Send the request as soon as a worker is ready for it."""
        patience_s = self._workplace.patience.wait_s
        if self._since is not None:
            patience_s -= time.monotonic() - self._since
        left = self._time_left()
        limit = patience_s if left is None else min(patience_s, left)
        try:
            async with asyncio.timeout(max(limit, 0.0)):
                await asyncio.sleep(delay_s)
                while not await self._send():
                    self._since = self._since or time.monotonic()
                    await self._workplace.changed()
        except TimeoutError:
            self._fail(self._error if limit == patience_s else _deadline_exceeded())

    async def _send(self) -> bool:
        """Send the current attempt; False when no worker is ready."""
        self.trace.lap("wait")
        place = await self._workplace.pick(self)
        while place is not None and not place.worker.ready:  # lost while a router was asked
            place = await self._workplace.pick(self)
        if place is None:
            return False
        self._place = place
        self.trace.sent(self.journal.attempt, place, self.journal.num_tokens)
        worker, submit = place.worker, self.journal.message()
        if self._source is not None and (self.journal.num_tokens or place.prefill is None):
            submit.source.worker, submit.source.address = self._source.name, self._source.address
        elif place.prefill is not None:
            submit.prefill.worker = place.prefill.name
            submit.prefill.address = place.prefill.address
        self._attempt = _Attempt(self, worker, submit)
        if self.fingerprint is None and worker.model is not None:
            self.fingerprint = worker.model.fingerprint
        if self.journal.attempt:
            self._note_resubmission(worker, submit)
        worker.submit(submit, self._attempt)
        return True

    def _note_resubmission(self, worker: Worker, submit: Submit) -> None:
        same_bits = self.agrees_with(worker)
        self._workplace.resubmitted(self._loss, same_bits)
        logger.warning(
            "request %s goes on at worker %s, attempt %d, behind %d tokens (%s)%s",
            submit.request_id, worker.name, submit.attempt, self.journal.num_tokens, self._loss,
            "" if same_bits else f": kernels that round otherwise than {self._numerics}",
        )  # fmt: skip

    def _note_numerics(self) -> None:
        if self._numerics is None and self._attempt is not None:
            model = self._attempt.worker.model
            self._numerics = None if model is None else model.numerics

    def _note_admission(self, admission: Admission) -> None:
        """A worker took the request up: what it says is the trace's, and its router's to hear."""
        self.trace.admitted(admission)
        # behind tokens that others gave, it tells of the prompt, and the router spoke of all
        fresh = not self.journal.num_tokens
        if fresh and self._place is not None and self._place.decided is not None:
            self._place.decided.observe(admission)

    def _time_left(self) -> float | None:
        deadline = self.journal.deadline
        return None if deadline is None else deadline - time.monotonic()

    def _end(self) -> None:
        self._attempt = None
        self.trace.left(None)
        self._replies.finish(self._index)

    def _fail(self, error: ApiError) -> None:
        self._end()
        self._replies.fail(error)


class _Attempt:
    """The request as it was sent once. Implements Receiver."""

    def __init__(self, run: Continuation, worker: Worker, submit: Submit) -> None:
        self.worker = worker
        self.eos_token_ids = () if worker.model is None else tuple(worker.model.eos_token_ids)
        self._run = run
        self._submit = submit

    @property
    def number(self) -> int:
        """The worker's number of the request."""
        return self._submit.request

    def deliver(self, output: ChoiceOutput) -> None:
        self._run.deliver(output)

    def refuse(self, failure: Failure) -> None:
        self._run.refused(self, failure)

    def lose(self, loss: Loss) -> None:
        self._run.lost(self, loss)


def _deadline_exceeded() -> ApiError:
    return ApiError("deadline_exceeded", "The request took longer than it was allowed to.")
