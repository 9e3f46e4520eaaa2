"""What rank 0 has the other ranks do beside steps, and what they say.

rank 0  ── {"verb": "…", "call": n, …} ──▶  rank r    answered by
        ◀─ {"call": n, "result": … | "error": "…"} ──
        ── {"verb": "…", …} ─────────────▶            without a number: no answer
        ◀─ {"event": …} ──────────────────            at any time
"""

from __future__ import annotations

import itertools
import json
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

DROP_CACHE = "drop_cache"
"""The verb that has a rank give the memory of its KV blocks back; answered with bytes."""

if TYPE_CHECKING:
    from collections.abc import Callable

    Send = Callable[[int, bytes], None]


class Calls:
    """Rank 0's side. Any thread."""

    def __init__(self, send: Send) -> None:
        """`send` takes a rank and a message, and drops what is for a lost one."""
        self._send = send
        self._numbers = itertools.count()
        self._open: dict[int, Future[Any]] = {}
        self._failure: Exception | None = None
        self.on_event: Callable[[int, dict[str, Any]], None] | None = None
        """Called with rank and event, on the gang's thread."""

    def ask(self, rank: int, verb: str, **args: object) -> Future[Any]:
        """Have a rank do something. The answer is OSError when it cannot, and what was wrong with
        the gang when that has failed."""
        number = next(self._numbers)
        # kept here: the answer may come, and the entry go, before this returns
        answer = self._open[number] = Future()
        self.tell(rank, verb, call=number, **args)
        if self._failure is not None:
            self.fail(self._failure)
        return answer

    def tell(self, rank: int, verb: str, **args: object) -> None:
        """Have a rank do something, without an answer."""
        self._send(rank, json.dumps({"verb": verb, **args}).encode())

    def hear(self, rank: int, payload: bytes) -> None:
        """A rank said something. Raises ValueError for what is no message."""
        message = json.loads(payload)
        if "event" in message:
            if self.on_event is not None:
                self.on_event(rank, message)
        elif (answer := self._open.pop(message["call"], None)) is not None:
            if "error" in message:
                answer.set_exception(OSError(message["error"]))
            else:
                answer.set_result(message["result"])

    def fail(self, error: Exception) -> None:
        """No rank answers any more."""
        self._failure = error
        for number in tuple(self._open):
            answer = self._open.pop(number, None)
            if answer is not None:
                with suppress(InvalidStateError):
                    answer.set_exception(error)


def answer_to(call: int, action: Callable[[], object]) -> bytes:
    """A rank's answer: what `action` gave, or why it could not."""
    try:
        message: dict[str, object] = {"call": call, "result": action()}
    except (OSError, ValueError) as error:  # TimeoutError is one
        message = {"call": call, "error": str(error) or type(error).__name__}
    return json.dumps(message).encode()
