"""Runs a scenario against a server: sessions start when they are due, turns follow one another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

from loadtest.workload import Session, sessions, start_times, trace_sessions
from quire.cli.bench.load import start_when_due

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.scenario import Scenario
    from quire.cli.bench.client import Outcome
    from quire.cli.bench.options import DatasetConfig
    from quire.cli.bench.target import Target


@dataclass(frozen=True)
class Request:
    """One request of the run. Times are seconds after the run's start."""

    request_class: str
    turn: int
    due: float
    outcome: Outcome


@dataclass(frozen=True)
class Run:
    """What a run gave."""

    began: float
    """On the clock of the outcomes."""
    requests: list[Request]


@dataclass
class Driver:
    """One run of a scenario against a target."""

    target: Target
    scenario: Scenario
    dataset: DatasetConfig
    """Seed, vocabulary, trace file, limits of lengths, ignore_eos."""
    _done: list[Request] = field(default_factory=list)
    _began: float = 0.0

    async def run(self) -> Run:
        """Send everything and wait for all answers. A session without an answer ends."""
        self._began = time.perf_counter()
        arrivals = self.scenario.arrivals
        if arrivals.process == "closed":
            endless = sessions(self.scenario, self.dataset.seed, self.dataset.vocab_size)
            async with asyncio.TaskGroup() as group:
                for _ in range(arrivals.max_concurrency or 1):
                    group.create_task(self._loop(endless))
        else:
            slots: contextlib.AbstractAsyncContextManager[object] = (
                asyncio.Semaphore(arrivals.max_concurrency)
                if arrivals.max_concurrency
                else contextlib.nullcontext()
            )

            async def job(session: Session, due: float) -> None:
                async with slots:
                    await self._session(session, due)

            await start_when_due(self._began, self._planned(), job)
        return Run(self._began, self._done)

    def _planned(self) -> Iterator[tuple[float, Session]]:
        if self.scenario.arrivals.process == "trace":
            return trace_sessions(self.scenario, self.dataset)
        made = sessions(self.scenario, self.dataset.seed, self.dataset.vocab_size)
        return zip(start_times(self.scenario, self.dataset.seed), made, strict=False)

    async def _loop(self, endless: Iterator[Session]) -> None:
        for _ in repeat(None):
            now = time.perf_counter() - self._began
            if now >= self.scenario.total_s:
                return
            await self._session(next(endless), now)

    async def _session(self, session: Session, due: float) -> None:
        answers: list[str] = []
        for number, turn in enumerate(session.turns):
            if number:
                await asyncio.sleep(turn.pause_s)
                due = time.perf_counter() - self._began
                if due > self.scenario.total_s:
                    return
            prompt = session.prompt(answers, is_chat=self.target.is_chat)
            body = self.target.body(prompt, turn.output_len, self.dataset.ignore_eos)
            is_last = number == len(session.turns) - 1
            outcome = await self.target.client.stream(self.target.path, body, keep_text=not is_last)
            outcome.late = max(outcome.sent - self._began - due, 0.0) if outcome.sent else 0.0
            self._done.append(Request(session.request_class, number, due, outcome))
            if not outcome.ok:
                return
            answers.append(outcome.text)
