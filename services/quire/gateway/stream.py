"""Writing a generation to its client as server-sent events.

The response begins with its first tokens, or with the first keep-alive if they take long: until
then an error can still be an HTTP status, which clients retry on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from quire.api.errors import ApiError
from quire.api.openai import usage_chunk
from quire.api.sse import DONE, HEADERS, KEEP_ALIVE, encode_json, event

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Send

    from quire.gateway.answers import Answer
    from quire.gateway.generation import Generation
    from quire.gateway.replies import Replies
    from quire.gateway.traffic import RequestClock
    from quire.proto.worker_pb2 import ChoiceOutput


class EventStream:
    """One open stream."""

    def __init__(
        self, generation: Generation, answer: Answer, send: Send, clock: RequestClock
    ) -> None:
        self._generation = generation
        self._answer = answer
        self._send = send
        self._clock = clock
        self._opened = [False] * len(generation.choices)
        self._number = 0
        self.started = False
        """The response has begun; errors are events from here on."""
        self.last_sent = time.monotonic()

    async def run(self, replies: Replies) -> None:
        """Stream until every choice has ended. Raises ApiError before the response has begun."""
        try:
            while not self._generation.done:
                outputs = await replies.next()
                data = self._take(outputs, replies)
                if data or not outputs:
                    await self._write(data or KEEP_ALIVE)
                self._clock.handed_over()
        except ApiError as error:
            if not self.started:
                raise
            await self._write(self._event(encode_json(error.body())) + DONE, last=True)
            raise
        await self._write(self._ending(), last=True)

    def _take(self, outputs: Sequence[tuple[int, ChoiceOutput]], replies: Replies) -> bytes:
        """The events for new outputs."""
        usage = self._generation.request.delivery.continuous_usage
        events = []
        for choice, delta in self._generation.take(outputs, replies, self._clock):
            chunks = self._answer.chunks(choice, delta)
            if not self._opened[choice]:
                self._opened[choice] = True
                chunks = self._answer.opening(choice) + chunks
            for chunk in chunks:
                closing = b"}"
                if usage:
                    closing = b',"usage":' + encode_json(self._generation.usage.body()) + b"}"
                events.append(self._event(chunk + closing))
        return b"".join(events)

    def _ending(self) -> bytes:
        if not self._generation.request.delivery.include_usage:
            return DONE
        usage = usage_chunk(self._answer.head, self._answer.kind, self._generation.usage)
        return self._event(usage) + DONE

    def _event(self, data: bytes) -> bytes:
        self._number += 1
        return event(data, self._number)

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        if not self.started:
            self.started = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": list(HEADERS)}
            )
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self.last_sent = time.monotonic()
