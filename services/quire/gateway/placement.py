"""Which worker gets a request."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.gateway.worker import Worker
    from quire.proto.router_pb2 import Explanation
    from quire.proto.worker_pb2 import Admission, ModelInfo
    from quire.router.query import RouteQuery


class Routed(Protocol):
    """A request in search of a worker."""

    def query(self, model: ModelInfo, exclude: frozenset[str]) -> RouteQuery:
        """It in the router's terms, with the names of the workers that must not be chosen."""


class Decided(Protocol):
    """A router's decision."""

    @property
    def router(self) -> str:
        """Name of the router that was asked."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens it expects to be cached where the prompt is computed."""

    @property
    def expected_ttft_s(self) -> float:
        """Seconds until the first token, as it expects."""

    def observe(self, admission: Admission) -> None:
        """The request was admitted; its router hears what was really cached. Never waits."""

    async def explain(self) -> Explanation | None:
        """The scores, None when the router does not answer or has forgotten."""


@dataclass(frozen=True)
class Place:
    """Where a request goes."""

    worker: Worker
    """Answers it."""
    prefill: Worker | None = None
    """Computes its prompt, when that is another one."""
    decided: Decided | None = None
    """By whom; None when no router was asked."""


class Placement(Protocol):
    """Chooses among workers that are ready."""

    async def run(self) -> None:
        """Keep what choices are made from, until cancelled."""

    def show(self) -> None:
        """Set gauges to what they are now, before a scrape."""

    async def pick(
        self, request: Routed, ready: Sequence[Worker], exclude: frozenset[str]
    ) -> Place:
        """Where to send the request: to one of `ready`, which is never empty.

        `ready` leaves out the workers that have failed the request, unless there is no other;
        `exclude` are the names of those, and of workers that are not ready. Takes a bounded time.
        """


class LeastLoad:
    """The least busy worker for each kind of work, by the roles that the workers report.

    Decode: fewest requests, of this gateway or by the last report if that is more; reports are up
    to a second old, but what this gateway has sent it knows at once. Prefill: fewest tokens to
    compute, among those of the same KV layout; nowhere else when the decoding worker is for prefill
    too. A worker that is not for a kind of work does it when no other can.
    """

    async def run(self) -> None:
        """Nothing to keep."""

    def show(self) -> None:
        """Nothing to show."""

    async def pick(
        self, request: Routed, ready: Sequence[Worker], exclude: frozenset[str]
    ) -> Place:
        """Ties are broken at random."""
        return self.choose(ready)

    def choose(self, ready: Sequence[Worker]) -> Place:
        """The same at once: nobody has to be asked."""
        decoding = [worker for worker in ready if _decode_weight(worker) > 0] or ready
        worker = min(decoding, key=lambda w: (_num_requests(w), random.random()))
        prefilling = [w for w in ready if w is not worker and _can_prefill_for(w, worker)]
        if _prefill_weight(worker) > 0 or not prefilling:
            return Place(worker)
        return Place(
            worker, min(prefilling, key=lambda w: (w.load.prefill_tokens, random.random()))
        )


def _num_requests(worker: Worker) -> int:
    return max(worker.num_open, worker.load.running + worker.load.waiting)


def _decode_weight(worker: Worker) -> float:
    return worker.load.decode_weight if worker.load.HasField("decode_weight") else 1.0


def _can_prefill_for(worker: Worker, other: Worker) -> bool:
    same_layout = _kv_layout(worker) == _kv_layout(other)
    return _prefill_weight(worker) > 0 and same_layout


def _kv_layout(worker: Worker) -> bytes:
    return b"" if worker.model is None else worker.model.kv.fingerprint


def _prefill_weight(worker: Worker) -> float:
    return worker.load.prefill_weight if worker.load.HasField("prefill_weight") else 1.0
