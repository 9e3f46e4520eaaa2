"""Which worker gets a request."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.gateway.worker import Worker
    from quire.router.query import RouteQuery


class Routed(Protocol):
    """A request in search of a worker."""

    def query(self, exclude: frozenset[str]) -> RouteQuery:
        """It in the router's terms, with the names of the workers that must not be chosen."""


class Placement(Protocol):
    """Chooses among workers that are ready."""

    def pick(self, request: Routed, ready: Sequence[Worker]) -> Worker | None:
        """The worker to send the request to, None when none of `ready` (never empty) may serve it.

        `ready` leaves out the workers that have failed the request, unless there is no other.
        """


class LeastLoad:
    """The worker with the fewest requests: of this gateway, or by its last report if that is more.

    Reports are up to a second old, but what this gateway has sent it knows at once.
    """

    def pick(self, request: Routed, ready: Sequence[Worker]) -> Worker | None:
        """Ties are broken at random."""
        return min(ready, key=lambda worker: (_num_requests(worker), random.random()))


def _num_requests(worker: Worker) -> int:
    return max(worker.num_open, worker.load.running + worker.load.waiting)
