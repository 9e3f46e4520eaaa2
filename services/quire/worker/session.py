"""One gateway's session: its requests, and the outputs waiting to be written to it."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING

from quire.proto import worker_pb2
from quire.worker.convert import output_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from quire.engine.output import ChoiceOutput

MAX_PENDING_OUTPUTS = 200_000
"""Outputs that a gateway may lag behind before its session is closed."""

_numbers = itertools.count(1)


class SlowGateway(Exception):
    """The gateway reads more slowly than the engine writes, for too long."""


class GatewaySession:
    """Requests of one gateway, by the engine's id for them.

    Lives on the event loop. Outputs of steps that the gateway has not read yet are sent together,
    so a slow gateway gets fewer, larger batches.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.requests: dict[str, tuple[int, int]] = {}
        """Engine's request id -> (the gateway's number, attempt)."""
        self._engine_ids: dict[int, str] = {}
        self._outputs: deque[ChoiceOutput] = deque()
        self._failures: deque[worker_pb2.Failure] = deque()
        self._step = 0
        self._wake = asyncio.Event()
        self._closed = False

    def engine_id(self, request: int) -> str | None:
        """The engine's id of the gateway's request; None when it has ended."""
        return self._engine_ids.get(request)

    def open(self, submit: worker_pb2.Submit) -> str:
        """Note a request; returns the engine's id for it."""
        engine_id = f"{self.number}/{submit.request}/{submit.attempt}/{submit.request_id}"
        self.requests[engine_id] = (submit.request, submit.attempt)
        self._engine_ids[submit.request] = engine_id
        return engine_id

    def end(self, engine_id: str) -> tuple[int, int]:
        """Forget a request; returns the gateway's number and the attempt. Raises KeyError."""
        number, attempt = self.requests.pop(engine_id)
        if self._engine_ids.get(number) == engine_id:
            del self._engine_ids[number]
        return number, attempt

    def deliver(self, step: int, outputs: list[ChoiceOutput]) -> None:
        """Queue what a step gave to this session's requests."""
        self._step = step
        self._outputs.extend(outputs)
        self._wake.set()

    def fail(self, failure: worker_pb2.Failure) -> None:
        """Queue a failure."""
        self._failures.append(failure)
        self._wake.set()

    def close(self) -> None:
        """End the stream after what is queued."""
        self._closed = True
        self._wake.set()

    async def replies(self) -> AsyncIterator[worker_pb2.SessionReply]:
        """What to write to the gateway, until closed. Raises SlowGateway when it lags too far."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._failures:
                yield worker_pb2.SessionReply(failure=self._failures.popleft())
            if len(self._outputs) > MAX_PENDING_OUTPUTS:
                raise SlowGateway
            if self._outputs:
                yield worker_pb2.SessionReply(batch=self._take_batch())
            if self._closed and not self._outputs and not self._failures:
                return

    def _take_batch(self) -> worker_pb2.TokenBatch:
        batch = worker_pb2.TokenBatch(step=self._step)
        while self._outputs:
            output = self._outputs.popleft()
            entry = self.requests.get(output.request_id)
            if entry is None:
                continue
            batch.outputs.append(output_to(output, *entry))
            if output.last_of_request:
                self.end(output.request_id)
        return batch
