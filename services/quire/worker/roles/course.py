"""How a prompt that another worker computes got on: marks of this worker's clock, made durations.

    first scheduled ─ask─ accepted ─[there: queue, prefill]─transfer─ last block ─commit─ ended
        ─resume─ first token

The other worker tells durations only. They lie somewhere between `ask` and `ended`, so what of that
time they do not cover is the request's way there and the transfer's way back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.engine.output import RemoteTimes

if TYPE_CHECKING:
    from quire.proto.worker_pb2 import FirstTokens

ONE_ARRIVAL_S = 0.002
"""Blocks that come this close together are shown as one chunk."""
MAX_ARRIVALS = 64
"""Of a prompt that are told apart; the last one takes the rest."""


@dataclass
class Course:
    """Marks of one prompt, time.monotonic(). Written on the event loop, read by the engine thread
    once the prompt is there."""

    accepted: float | None = None
    ended: float | None = None
    """The transfer was committed, or had failed; None when nobody was asked."""
    first: FirstTokens | None = None
    """What came with the commit; None when it failed."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(when the last of them came, blocks)."""

    def note_arrival(self) -> None:
        """A block came."""
        now = time.monotonic()
        if self.arrivals:
            at, blocks = self.arrivals[-1]
            if now - at < ONE_ARRIVAL_S or len(self.arrivals) >= MAX_ARRIVALS:
                self.arrivals[-1] = (now, blocks + 1)
                return
        self.arrivals.append((now, 1))

    def times(self, worker: str, scheduled: float, first_token: float) -> RemoteTimes | None:
        """Durations that sum to the time between the two; None when nobody was asked."""
        if self.ended is None:
            return None
        resume_s = first_token - self.ended
        exchange_s = self.ended - scheduled
        arrivals = tuple((at - scheduled, blocks) for at, blocks in self.arrivals)
        if self.first is None:
            return RemoteTimes(
                worker, True, exchange_s, 0.0, 0.0, 0.0, 0.0, resume_s, arrivals=arrivals
            )
        queue_s = min(self.first.queue_s, exchange_s)
        prefill_s = min(self.first.prefill_s, exchange_s - queue_s)
        rest_s = exchange_s - queue_s - prefill_s
        ask_s = min((self.accepted or scheduled) - scheduled, rest_s)
        last = self.arrivals[-1][0] if self.arrivals else self.ended
        commit_s = min(max(self.ended - last, 0.0), rest_s - ask_s)
        return RemoteTimes(
            worker=worker,
            failed=False,
            ask_s=ask_s,
            queue_s=queue_s,
            prefill_s=prefill_s,
            transfer_s=rest_s - ask_s - commit_s,
            commit_s=commit_s,
            resume_s=resume_s,
            cached_tokens=self.first.cached_tokens,
            arrivals=arrivals,
        )
