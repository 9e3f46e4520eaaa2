"""Which worker gets a request."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.gateway.worker import Worker
    from quire.router.query import RouteQuery


class Routed(Protocol):
    """A request in search of a worker."""

    def query(self, exclude: frozenset[str]) -> RouteQuery:
        """It in the router's terms, with the names of the workers that must not be chosen."""


@dataclass(frozen=True)
class Place:
    """Where a request goes."""

    worker: Worker
    """Answers it."""
    prefill: Worker | None = None
    """Computes its prompt, when that is another one."""


class Placement(Protocol):
    """Chooses among workers that are ready."""

    def pick(self, request: Routed, ready: Sequence[Worker]) -> Place | None:
        """Where to send the request, None when none of `ready` (never empty) may serve it.

        `ready` leaves out the workers that have failed the request, unless there is no other.
        """


class LeastLoad:
    """The least busy worker for each kind of work, by the roles that the workers report.

    Decode: fewest requests, of this gateway or by the last report if that is more; reports are up
    to a second old, but what this gateway has sent it knows at once. Prefill: fewest tokens to
    compute; nowhere else when the decoding worker is for prefill too. A worker that is not for a
    kind of work does it when no other can.
    """

    def pick(self, request: Routed, ready: Sequence[Worker]) -> Place | None:
        """Ties are broken at random."""
        decoding = [worker for worker in ready if _decode_weight(worker) > 0] or ready
        worker = min(decoding, key=lambda w: (_num_requests(w), random.random()))
        prefilling = [w for w in ready if w is not worker and _prefill_weight(w) > 0]
        if _prefill_weight(worker) > 0 or not prefilling:
            return Place(worker)
        return Place(
            worker, min(prefilling, key=lambda w: (w.load.prefill_tokens, random.random()))
        )


def _num_requests(worker: Worker) -> int:
    return max(worker.num_open, worker.load.running + worker.load.waiting)


def _decode_weight(worker: Worker) -> float:
    return worker.load.decode_weight if worker.load.HasField("decode_weight") else 1.0


def _prefill_weight(worker: Worker) -> float:
    return worker.load.prefill_weight if worker.load.HasField("prefill_weight") else 1.0
