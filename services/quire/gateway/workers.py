"""All workers of a gateway as one: ready when one of them is, and requests go on when one is lost.

submit ─▶ Continuation per prompt ─▶ Placement ─▶ Worker
                    ▲ lost, hung, drained, refused │
                    └──────────────────────────────┘
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.gateway.continuation import Continuation, Patience
from quire.gateway.placement import LeastLoad
from quire.gateway.replies import Replies
from quire.gateway.trace import Trace
from quire.gateway.worker import Loss
from quire.proto import worker_pb2
from quire.telemetry.instruments import join_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from quire.gateway.placement import Place, Placement
    from quire.gateway.worker import Worker
    from quire.router.discovery import Discovery

SUMMED = (
    "running", "waiting", "queued_tokens", "blocks_free", "blocks_cached", "blocks_owned",
    "prefill_tokens",
)  # fmt: skip


LINGER_S, LINGER_POLL_S = 2.0, 0.1
"""A worker that is none of ours any more is still told that its requests have moved."""


@dataclass(frozen=True)
class Joining:
    """How workers come and go."""

    discovery: Discovery
    connect: Callable[[str, str], Worker]
    """Name and address -> a worker, not yet running."""


class Workers:
    """The workers of one model. `run` must be running; requests end with it."""

    def __init__(
        self,
        workers: Sequence[Worker],
        patience: Patience,
        *,
        max_backlog: int = 1024,
        placement: Placement | None = None,
        on_resubmission: Callable[[Loss, bool], None] = lambda *_: None,
    ) -> None:
        """`max_backlog` is in tokens per choice, see `Replies`."""
        self.all: tuple[Worker, ...] = ()
        self._leaving: set[Worker] = set()
        self._joining: Joining | None = None
        self._members = asyncio.Event()
        self.patience = patience
        self._max_backlog = max_backlog
        self.placement = placement or LeastLoad()
        self.resubmitted = on_resubmission
        self._tasks: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self.set(workers)

    def follow(self, joining: Joining) -> None:
        """Have `run` see who comes and goes."""
        self._joining = joining

    def set(self, workers: Sequence[Worker]) -> None:
        """These are the workers from now on.

        Requests of those that are not among them go elsewhere; while nobody else is ready with the
        same model they go on where they are.
        """
        self._leaving |= set(self.all).difference(workers)
        self.all = tuple(workers)
        for worker in self.all:
            worker.on_change = self._on_change
        self._members.set()
        self._on_change()

    async def run(self) -> None:
        """Keep all connections until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                if self._joining is not None:
                    group.create_task(self._follow(self._joining), name="discovery")
                await self._connect(group)
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, joining: Joining) -> None:
        """Whoever is discovered."""
        known: dict[tuple[str, str], Worker] = {}
        async for pods in joining.discovery.watch():
            known = {pod: known.get(pod) or joining.connect(*pod) for pod in pods.items()}
            self.set(tuple(known.values()))

    async def _connect(self, group: asyncio.TaskGroup) -> None:
        """A connection for each worker, for as long as it is one."""
        running: dict[Worker, asyncio.Task[None]] = {}
        while True:
            self._members.clear()
            for worker in self.all:
                if worker not in running:
                    task = group.create_task(worker.run(), name=f"worker {worker.name}")
                    running[worker] = task
            for worker in self._leaving & running.keys():
                group.create_task(self._see_off(worker, running.pop(worker)))
            await self._members.wait()

    async def _see_off(self, worker: Worker, connection: asyncio.Task[None]) -> None:
        await asyncio.sleep(LINGER_S)
        while worker.num_open:  # noqa: ASYNC110 - of a protocol without such an event
            await asyncio.sleep(LINGER_POLL_S)
        connection.cancel()
        self._leaving.discard(worker)

    # ---- as one worker

    @property
    def ready(self) -> bool:
        """At least one worker takes requests."""
        return any(worker.ready for worker in self.all)

    @property
    def num_ready(self) -> int:
        """Workers that take requests."""
        return sum(worker.ready for worker in self.all)

    @property
    def model(self) -> worker_pb2.ModelInfo | None:
        """The loaded model, of a ready worker if there is one."""
        ordered = sorted(self.all, key=lambda worker: not worker.ready)
        return next((w.model for w in ordered if w.model is not None), None)

    @property
    def startup(self) -> worker_pb2.Startup:
        """The start-up phase: of a ready worker, else of the first that can be reached."""
        ordered = sorted(self.all, key=lambda w: (not w.ready, w.startup.phase == "connect"))
        return ordered[0].startup if ordered else worker_pb2.Startup(phase="discover")

    @property
    def load(self) -> worker_pb2.Load:
        """Sums over the ready workers; `step_age_s` is the largest of theirs."""
        total = worker_pb2.Load()
        for load in (worker.load for worker in self.all if worker.ready):
            for name in SUMMED:
                setattr(total, name, getattr(total, name) + getattr(load, name))
            total.step_age_s = max(total.step_age_s, load.step_age_s)
        return total

    async def wait_ready(self) -> worker_pb2.ModelInfo:
        """The loaded model, once requests can be submitted."""
        while not self.ready or self.model is None:
            await self.changed()
        return self.model

    async def wait_lost(self) -> None:
        """Return when no worker is ready any more."""
        while self.ready:
            await self.changed()

    def submit(self, submits: Sequence[worker_pb2.Submit], trace: Trace | None = None) -> Replies:
        """Send requests whose answers are read together, each to the worker that suits it."""
        trace = trace or Trace()
        runs: list[Continuation] = []
        num_choices = sum(max(submit.sampling.n, 1) for submit in submits)
        replies = Replies(
            len(submits),
            self._max_backlog * num_choices,
            lambda index, choice: runs[index].abort(choice),
        )
        runs += [
            Continuation(submit, replies, index, self, trace.prompt())
            for index, submit in enumerate(submits)
        ]
        for run in runs:
            run.start()
        return replies

    async def collect_metrics(self) -> str:
        """The workers' Prometheus pages, joined."""
        pages = await asyncio.gather(*(worker.collect_metrics() for worker in self.all))
        return join_pages(pages)

    # ---- Workplace

    async def pick(self, run: Continuation) -> Place | None:
        """Ready workers, if possible such as have not failed the request, and among those such as
        compute the same bits as those that it has its tokens from."""
        ready = self._ready_for(run)
        if not ready:
            return None
        candidates = [worker for worker in ready if worker.name not in run.tried] or ready
        candidates = [w for w in candidates if run.agrees_with(w)] or candidates
        named = {worker.name for worker in candidates}
        known = (*self.all, *self._leaving)
        others = frozenset(worker.name for worker in known if worker.name not in named)
        return await self.placement.pick(run, candidates, others)

    def has_untried(self, run: Continuation) -> bool:
        """A worker is ready that has not failed the request since its last token."""
        return any(worker.name not in run.tried for worker in self._ready_for(run))

    async def changed(self) -> None:
        """Return when a worker has become ready, or is so no more."""
        await self._change.wait()

    def spawn(self, job: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a job, at the longest until the gateway ends."""
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _ready_for(self, run: Continuation) -> list[Worker]:
        wanted = run.fingerprint
        return [
            worker
            for worker in self.all
            if worker.ready
            and (wanted is None or worker.model is None or worker.model.fingerprint == wanted)
        ]

    def _on_change(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
        for worker in (*self.all, *self._leaving):
            is_leaving = worker.load.draining or worker in self._leaving
            if is_leaving and worker.num_open and self._is_replaced(worker):
                worker.release(Loss.DRAINING)

    def _is_replaced(self, leaving: Worker) -> bool:
        """Somebody is ready to go on with what its model has begun."""
        return any(
            worker.ready
            and (
                leaving.model is None
                or worker.model is None
                or worker.model.fingerprint == leaving.model.fingerprint
            )
            for worker in self.all
        )
