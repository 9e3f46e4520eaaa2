"""Follows one worker for `quire top`: its load by Watch, its counters by CollectMetrics.

    connecting -> loading -> ready, a line a second -> unreachable (why) -> connecting ...

Every wait has a limit; a worker that is gone is asked again until top ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from quire.cli.scrape import Page
from quire.cli.workers import CHANNEL_OPTIONS, role_of, words
from quire.proto import worker_pb2
from quire.proto.worker_pb2_grpc import WorkerStub
from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from quire.cluster.rpc import Cluster
    from quire.proto.worker_pb2_grpc import WorkerAsyncStub

WINDOW_S = 10.0
"""Rates, hits and latencies are of this long a time."""
SILENT_S = 5.0
"""A ready worker says its load every second."""
LOADING_SILENT_S = 60.0
SCRAPE_TIMEOUT_S = 2.0
RETRY_S = 1.0


@dataclass(frozen=True)
class Row:
    """One worker at one moment. None: not known, or nothing happened."""

    pod: str
    state: str
    model: str = ""
    role: str = ""
    running: int | None = None
    waiting: int | None = None
    kv_ratio: float | None = None
    """Share of blocks that requests own."""
    hit_ratio: float | None = None
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    itl_p50_s: float | None = None
    itl_p95_s: float | None = None
    sent_gb_per_s: float | None = None
    received_gb_per_s: float | None = None


class Follower:
    """One worker, by the address it was given with."""

    def __init__(self, name: str, address: str, cluster: Cluster) -> None:
        self.name = name
        self._address = address
        self._cluster = cluster
        self._state = "connecting"
        self._model: worker_pb2.ModelInfo | None = None
        self._load: worker_pb2.Load | None = None
        self._pages: deque[Page] = deque()
        self._scrape_s = 1.0

    async def run(self, interval_s: float) -> None:
        """Until cancelled."""
        self._scrape_s = interval_s
        while True:
            try:
                async with self._cluster.channel(self._address, CHANNEL_OPTIONS) as channel:
                    await self._follow(WorkerStub(channel))
                problem = "it ended"
            except TimeoutError:
                problem = "silent"
            except grpc.aio.AioRpcError as error:
                problem = words(error)
            except ValueError as error:
                problem = f"its metrics cannot be read: {error}"
            self._state, self._load = f"unreachable: {problem}", None
            self._pages.clear()  # the next process counts from 0
            await asyncio.sleep(RETRY_S)

    async def _follow(self, stub: WorkerAsyncStub) -> None:
        """One call, to its end. Raises TimeoutError and AioRpcError."""
        call = stub.Watch(worker_pb2.WatchRequest())
        limit_s, next_scrape = SILENT_S, 0.0
        try:
            while True:
                async with asyncio.timeout(limit_s):
                    update = await call.read()
                if not isinstance(update, worker_pb2.WorkerUpdate):
                    return
                if update.HasField("startup"):
                    limit_s, self._state = LOADING_SILENT_S, f"loading: {update.startup.phase}"
                elif update.HasField("model"):
                    limit_s, self._model = SILENT_S, update.model
                elif update.HasField("load"):
                    self._load, self._state = update.load, _standing(update.load)
                    if time.monotonic() >= next_scrape:
                        next_scrape = time.monotonic() + self._scrape_s
                        await self._scrape(stub)
        finally:
            call.cancel()

    async def _scrape(self, stub: WorkerAsyncStub) -> None:
        request = worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics())
        reply = await stub.Control(request, timeout=SCRAPE_TIMEOUT_S)
        self._pages.append(Page.parse(reply.metrics, time.monotonic()))
        while len(self._pages) > 2 and self._pages[-1].at - self._pages[1].at >= WINDOW_S:
            self._pages.popleft()

    @property
    def num_pages(self) -> int:
        """Pages that rates are made of; two make the first ones."""
        return len(self._pages)

    @property
    def is_reached(self) -> bool:
        """It has said how it stands."""
        return self._state != "connecting"

    def row(self, *, since_start: bool) -> Row:
        """How it stands. `since_start`: hits and latencies of all its time, not the last 10 s."""
        load, model = self._load, self._model
        name = model.model if model is not None else ""
        if load is None:
            return Row(self.name, self._state, name)
        blocks = load.blocks_free + load.blocks_cached + load.blocks_owned
        return Row(
            pod=self.name,
            state=self._state,
            model=name,
            role=role_of(load),
            running=load.running,
            waiting=load.waiting,
            kv_ratio=load.blocks_owned / blocks if blocks else None,
            **self._figures(since_start=since_start),
        )

    def _figures(self, *, since_start: bool) -> dict[str, float | None]:
        if not self._pages:
            return {}
        recent = self._pages[-1].since(self._pages[0])
        page = self._pages[-1] if since_start else recent
        queries = page.count(m.PREFIX_CACHE_QUERIES)
        figures: dict[str, float | None] = {
            "hit_ratio": page.count(m.PREFIX_CACHE_HITS) / queries if queries else None,
            "ttft_p50_s": page.quantile(m.TIME_TO_FIRST_TOKEN, 0.5),
            "ttft_p95_s": page.quantile(m.TIME_TO_FIRST_TOKEN, 0.95),
            "itl_p50_s": page.quantile(m.INTER_TOKEN_LATENCY, 0.5),
            "itl_p95_s": page.quantile(m.INTER_TOKEN_LATENCY, 0.95),
        }
        if recent.at > 0:
            figures |= {
                "prompt_tokens_per_s": recent.count(m.PROMPT_TOKENS) / recent.at,
                "output_tokens_per_s": recent.count(m.GENERATION_TOKENS) / recent.at,
                "sent_gb_per_s": recent.counts["sent"] / recent.at / 1e9,
                "received_gb_per_s": recent.counts["received"] / recent.at / 1e9,
            }
        return figures


def _standing(load: worker_pb2.Load) -> str:
    if load.sleeping:
        return "asleep"
    return "draining" if load.draining else "ready"
