"""What workers send back for one HTTP request, between their sessions and its reader.

    session reader --journal, deliver--> [outputs waiting] --next--> the request's own task

Outputs that arrive while the task is busy are handed over together. The backlog is bounded: a
client that does not read holds back its task, not the session.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from quire.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from quire.proto.worker_pb2 import ChoiceOutput


class ClientGone(Exception):
    """The client closed the connection: there is no one left to answer."""


class Replies:
    """Outputs of the requests submitted together, by their index. Leaving the context ends them.

    Methods other than `next` may be called from any task of the loop and never wait.
    """

    def __init__(
        self, count: int, max_backlog: int, abort: Callable[[int, int | None], None]
    ) -> None:
        self._open = set(range(count))
        self._max_backlog = max_backlog
        self._abort = abort
        self._outputs: list[tuple[int, ChoiceOutput]] = []
        self._backlog = 0  # tokens in _outputs
        self._error: Exception | None = None
        self._nudged = False
        self._waiter: asyncio.Future[None] | None = None
        self.on_overflow: Callable[[], None] | None = None
        """Called when the backlog is full: the reader may be stuck in writing to the client."""

    async def __aenter__(self) -> Replies:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for index in list(self._open):
            self.abort(index)

    async def next(self) -> list[tuple[int, ChoiceOutput]]:
        """Everything that has arrived, waiting for something; [] after a nudge.

        Raises what `fail` was given, once all outputs before it were handed over.
        """
        while not (self._outputs or self._nudged or self._error):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._nudged = False
        if self._outputs:
            outputs, self._outputs, self._backlog = self._outputs, [], 0
            return outputs
        if self._error is not None:
            raise self._error
        return []

    def deliver(self, index: int, output: ChoiceOutput) -> None:
        """An output of request `index` arrived."""
        self._backlog += len(output.token_ids)
        if self._backlog > self._max_backlog:
            message = "The answer was not read for too long."
            self._outputs.clear()
            self.fail(ApiError("request_timeout", message))
            if self.on_overflow is not None:
                self.on_overflow()
            return
        self._outputs.append((index, output))
        self._wake()

    def finish(self, index: int) -> None:
        """The worker holds nothing of request `index` any more."""
        self._open.discard(index)

    def abort(self, index: int, choice: int | None = None) -> None:
        """No more outputs of request `index`, or of one choice of it, are wanted."""
        if index in self._open:
            if choice is None:
                self._open.discard(index)
            self._abort(index, choice)

    def fail(self, error: Exception) -> None:
        """End the wait with an error; the first one counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def nudge(self) -> None:
        """Let `next` return although nothing has arrived: time for a keep-alive."""
        self._nudged = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
