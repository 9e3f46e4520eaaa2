"""The requests of all gateways: into the engine, and what comes of them back to their sessions.

Life of a request here:

    Submit -> EngineLoop.submit -> (engine thread) add_request
              engine thread: step -> Sink.on_step -> event loop: deliver -> TokenBatch
    it ends with a finish_reason per choice, with a Failure, by Abort, or with its session

However a session ends, every request of it is aborted: a killed gateway can look like one that
closed its stream in an orderly way.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from quire.api.errors import ApiError
from quire.engine.request import FinishReason
from quire.worker import convert
from quire.worker.disaggregation import is_export
from quire.worker.roles.source import PARK_S, parked
from quire.worker.session import GatewaySession

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from quire.engine.loop import EngineLoop
    from quire.engine.output import ChoiceOutput
    from quire.proto import worker_pb2
    from quire.worker.disaggregation import Disaggregation
    from quire.worker.metrics import EngineMetrics
    from quire.worker.standing import Standing


class Sessions:
    """See the module. Lives on the event loop."""

    def __init__(self, standing: Standing, metrics: EngineMetrics) -> None:
        self._standing = standing
        self._metrics = metrics
        self._asyncio = asyncio.get_running_loop()
        self._sessions: dict[int, GatewaySession] = {}
        self._loop: EngineLoop | None = None
        self._disaggregation: Disaggregation | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return sum(len(session.requests) for session in self._sessions.values())

    def attach(self, loop: EngineLoop, disaggregation: Disaggregation | None) -> None:
        """Requests are taken from now on."""
        self._loop, self._disaggregation = loop, disaggregation

    def detach(self) -> None:
        """The engine stops: end every session."""
        self._loop = None
        for session in self._sessions.values():
            session.close()

    def fail_all(self, message: str) -> None:
        """The engine is lost: tell every request and refuse new ones."""
        self._loop = None
        for session in self._sessions.values():
            for request_id in list(session.requests):
                self.reject(request_id, ApiError("internal_error", message))
            session.close()

    async def serve(
        self, requests: AsyncIterator[worker_pb2.SessionRequest]
    ) -> AsyncGenerator[worker_pb2.SessionReply]:
        """One gateway's session, to its end. Raises SlowGateway."""
        session = GatewaySession()
        self._sessions[session.number] = session
        reader = asyncio.create_task(self._read(session, requests))
        try:
            async for reply in session.replies():
                yield reply
        finally:
            reader.cancel()
            del self._sessions[session.number]
            for request_id in session.requests:
                self._abort(request_id, None)

    # ---- from the engine

    def deliver(self, step: int, outputs: list[ChoiceOutput]) -> None:
        """What a step gave, to whom it belongs."""
        by_session: defaultdict[int, list[ChoiceOutput]] = defaultdict(list)
        for output in outputs:
            if is_export(output.request_id):
                if self._disaggregation is not None:
                    self._disaggregation.prefill.on_output(output)
            elif output.finish_reason is FinishReason.ERROR:
                message = "The model gave no finite number for this request."
                self.reject(output.request_id, ApiError("internal_error", message))
            else:
                by_session[_session_number(output.request_id)].append(output)
        for number, share in by_session.items():
            if (session := self._sessions.get(number)) is not None:
                session.deliver(step, share)

    def reject(self, request_id: str, error: ApiError) -> None:
        """A request was refused, or failed."""
        if is_export(request_id):
            if self._disaggregation is not None:
                self._disaggregation.prefill.on_rejected(request_id, error)
            return
        session = self._sessions.get(_session_number(request_id))
        if session is not None and request_id in session.requests:
            request, attempt = session.end(request_id)
            session.fail(convert.failure_to(error, request, attempt))

    # ---- from gateways

    async def _read(
        self, session: GatewaySession, requests: AsyncIterator[worker_pb2.SessionRequest]
    ) -> None:
        """Take in the gateway's messages; its end, orderly or not, ends the session."""
        try:
            async for message in requests:
                if message.WhichOneof("message") == "submit":
                    self._submit(session, message.submit)
                elif (request_id := session.engine_id(message.abort.request)) is not None:
                    choice = message.abort.choice if message.abort.HasField("choice") else None
                    if message.abort.moved and choice is None:
                        self._move(request_id)
                    else:
                        self._abort(request_id, choice)
        finally:
            session.close()

    def _submit(self, session: GatewaySession, submit: worker_pb2.Submit) -> None:
        request_id = session.open(submit)
        if self._loop is None:
            message = "The model is loading. Please retry."
            self.reject(request_id, ApiError("not_ready", message, retry_after_s=2))
            return
        if (refusal := self._standing.refusal()) is not None:
            self.reject(request_id, refusal)
            return
        try:
            request = convert.request_from(submit, request_id)
        except ApiError as error:
            self.reject(request_id, error)
            return
        if self._disaggregation is not None and submit.HasField("source"):
            self._disaggregation.fetch.submit(request, submit)
            return
        if self._disaggregation is not None:
            request = self._disaggregation.with_remote_prompt(request, submit)
        if submit.HasField("source"):
            self._loop.call(lambda _: self._metrics.moved_here(request, 0))
        self._loop.submit(request)

    def _abort(self, request_id: str, choice: int | None) -> None:
        parts = self._disaggregation
        if self._loop is None or (parts is not None and parts.fetch.abort(request_id, choice)):
            return
        self._loop.abort(request_id, choice)

    def _move(self, request_id: str) -> None:
        """The request goes on at another worker, which may soon fetch its blocks."""
        parts, loop = self._disaggregation, self._loop
        if loop is None or parts is None or parts.fetch.abort(request_id, None):
            self._abort(request_id, None)
            return
        key = parked(request_id.split("/", 3)[3])
        loop.move(request_id, key)
        self._asyncio.call_later(
            PARK_S, loop.call, lambda engine: engine.scheduler.handover.release(key)
        )


def _session_number(request_id: str) -> int:
    return int(request_id.partition("/")[0])
