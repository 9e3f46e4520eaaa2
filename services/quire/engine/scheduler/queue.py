"""Requests that wait for their first or, after a preemption, next step."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.engine.request import Sequence


class WaitingQueue:
    """Sequences in the order of their requests: priority (if used), then arrival.

    A preempted sequence keeps its request's arrival, so it comes back before later arrivals.
    Finished sequences (aborted, expired) are dropped when they reach the front.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float], int, int, Sequence]] = []
        self._ticket = itertools.count()
        self.num_tokens = 0
        """Tokens the waiting sequences still have to compute, cache hits not counted."""
        self.num_sequences = 0

    def push(self, seq: Sequence) -> None:
        """Add a sequence."""
        entry = (seq.state.order, seq.choice, next(self._ticket), seq)
        heapq.heappush(self._heap, entry)
        self.num_tokens += seq.num_tokens
        self.num_sequences += 1

    def peek(self) -> Sequence | None:
        """The next sequence to admit, still in the queue."""
        while self._heap and self._heap[0][-1].finished:
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Sequence:
        """Remove the sequence that `peek` showed."""
        seq = heapq.heappop(self._heap)[-1]
        self._leave(seq)
        return seq

    def discard(self, seq: Sequence) -> None:
        """A waiting sequence was finished: it no longer counts."""
        self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        self.num_tokens -= seq.num_tokens
        self.num_sequences -= 1

    def __iter__(self) -> Iterator[Sequence]:
        return (entry[-1] for entry in self._heap if not entry[-1].finished)

    def __len__(self) -> int:
        return self.num_sequences
