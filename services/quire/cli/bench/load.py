"""Open-loop load: requests start when they are due, whatever became of those before."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from quire.cli.bench.client import Client, Outcome
    from quire.cli.bench.datasets import Sample
    from quire.cli.bench.options import LoadConfig

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Load:
    """What a run measured."""

    outcomes: list[Outcome]
    duration_s: float
    """First start to last end."""
    peak_concurrency: int


def arrival_times(samples: Sequence[Sample], config: LoadConfig, seed: int) -> list[float]:
    """Seconds from the start at which each request is due, rising.

    A trace brings its own times. Otherwise gaps are drawn from a gamma distribution of the given
    rate and shape, and scaled so that the last request is due when the rate says: two runs of the
    same rate differ in their bursts, not in how much they ask for.
    """
    if all(sample.arrival_s is not None for sample in samples):
        return sorted((sample.arrival_s or 0.0) / config.trace_speedup for sample in samples)
    if math.isinf(config.rate):
        return [0.0] * len(samples)
    rng = random.Random(seed)
    times = [0.0]
    for _ in samples[1:]:
        times.append(times[-1] + rng.gammavariate(config.burstiness, 1.0))
    wanted = (len(samples) - 1) / config.rate
    scale = wanted / times[-1] if times[-1] > 0 else 0.0
    return [t * scale for t in times]


async def start_when_due(
    began: float,
    planned: Iterable[tuple[float, T]],
    job: Callable[[T, float], Coroutine[None, None, R]],
) -> list[R]:
    """Start `job(what, due)` for each (due, what) when it is due, in seconds after `began`, and
    wait for all. What is already due starts at once. The first failure ends the others."""
    async with asyncio.TaskGroup() as group:
        tasks = []
        for due, what in planned:
            wait = began + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(job(what, due)))
    return [task.result() for task in tasks]


@dataclass
class LoadRun:
    """One run of prepared requests against a server."""

    client: Client
    path: str
    progress: Callable[[], None] = lambda: None
    _running: int = 0
    _peak: int = 0

    async def run(
        self, bodies: Sequence[bytes], times: Sequence[float], max_concurrency: int | None = None
    ) -> Load:
        """Send each body when it is due, and wait for all answers."""
        slots: contextlib.AbstractAsyncContextManager[object] = (
            contextlib.nullcontext()
            if max_concurrency is None
            else asyncio.Semaphore(max_concurrency)
        )
        began = time.perf_counter()

        def job(body: bytes, due: float) -> Coroutine[None, None, Outcome]:
            return self._one(body, began + due, slots)

        outcomes = await start_when_due(began, zip(times, bodies, strict=True), job)
        return Load(outcomes, time.perf_counter() - began, self._peak)

    async def _one(
        self, body: bytes, due: float, slots: contextlib.AbstractAsyncContextManager[object]
    ) -> Outcome:
        async with slots:
            late = time.perf_counter() - due
            self._running += 1
            self._peak = max(self._peak, self._running)
            try:
                outcome = await self.client.stream(self.path, body)
            finally:
                self._running -= 1
            outcome.late = late
            self.progress()
            return outcome
