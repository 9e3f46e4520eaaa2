"""The engine's own thread: takes in requests, steps, hands out tokens, shows that it lives.

Other threads talk to it through the inbox only. What a step produced goes to one `Sink`, called on
the engine thread: it must not block.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quire.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.engine.engine import Engine
    from quire.engine.output import ChoiceOutput
    from quire.engine.pace import Rates
    from quire.engine.request import EngineRequest
    from quire.engine.scheduler.remote import BlocksReady, PrefillNeeded
    from quire.engine.scheduler.scheduler import DrawnToken

logger = logging.getLogger(__name__)

REMOTE_WAIT_S = 0.05
"""How often an idle engine looks after the prompts that another worker computes."""


class Sink(Protocol):
    """Where the loop delivers. Called on the engine thread; must not block."""

    def on_step(self, record: StepRecord, outputs: list[ChoiceOutput]) -> None:
        """A step finished, or requests ended between steps."""

    def on_prefill_needed(self, needed: list[PrefillNeeded]) -> None:
        """Admitted requests wait for their prompts to be computed by another worker."""

    def on_blocks_ready(self, ready: list[BlocksReady]) -> None:
        """Blocks of exported prompts were computed; told before the outputs of the same step."""

    def on_added(self, request: EngineRequest) -> None:
        """A submitted request was queued."""

    def on_rejected(self, request_id: str, error: ApiError) -> None:
        """A submitted request was refused; nothing of it is left."""

    def on_death(self, error: BaseException) -> None:
        """The engine failed and the thread ends: every request in it is lost."""


@dataclass(frozen=True)
class StepRecord:
    """A step that finished; `num_tokens` 0 when requests only ended."""

    step: int
    num_tokens: int
    duration_s: float
    """From the end of the step before, where that ended after this one began."""


@dataclass(frozen=True)
class EngineState:
    """A consistent look at the engine, taken between steps."""

    steps: int
    running: int
    waiting: int
    queued_tokens: int
    prefill_tokens: int
    """Prompt tokens not yet computed, of waiting and running requests."""
    rates: Rates
    blocks_free: int
    blocks_cached: int
    blocks_owned: int
    blocks_promised: int
    """Of those free or cached: what admitted prompts will still need."""
    preemptions: int
    cache_queries: int
    cache_hits: int


class EngineLoop:
    """Runs an engine on a thread of its own until `stop`."""

    def __init__(self, engine: Engine, sink: Sink) -> None:
        self.engine = engine
        self._sink = sink
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._last_progress = time.monotonic()
        self._busy = False
        self._seen = 0.0  # of the runner's progress within steps
        self.state = self._look()

    def start(self) -> None:
        """Start the thread."""
        if self.engine.model.gang is not None:
            self.engine.model.gang.watch(self._fail)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Stop after the step in progress; False when it did not end in time."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; the sink hears of it. Any thread."""
        self._inbox.put(lambda: self._add(request))

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it, with reason "abort". Any thread."""
        self._inbox.put(lambda: self._deliver(self.engine.abort(request_id, choice), 0, 0.0))

    def move(self, request_id: str, key: str) -> None:
        """End a request that goes on at another pod; its full blocks are parked. Any thread."""
        self._inbox.put(lambda: self.engine.scheduler.park(request_id, key))
        self.abort(request_id)

    def complete_remote(self, request_id: str, drawn: list[DrawnToken]) -> None:
        """A prompt that was computed elsewhere is in place, with its first tokens. Any thread."""
        scheduler = self.engine.scheduler
        self._inbox.put(lambda: self._deliver(scheduler.complete_remote(request_id, drawn), 0, 0.0))

    def call(self, function: Callable[[Engine], None]) -> None:
        """Run a function on the engine thread between two steps. Any thread."""
        self._inbox.put(lambda: function(self.engine))

    def stalled_s(self) -> float:
        """Seconds without progress while there is work, 0 when idle. To be asked every few seconds
        at least: what a long step does in between is seen only when somebody looks."""
        if not self._busy:
            return 0.0
        if (progress := self.engine.runner.progress()) != self._seen:
            self._seen, self._last_progress = progress, time.monotonic()
        return time.monotonic() - self._last_progress

    def _fail(self, error: Exception) -> None:
        """Another rank was lost: an idle engine would notice only at its next step. Any thread."""

        def give_up() -> None:
            raise error

        self._inbox.put(give_up)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._step()
        except BaseException as error:
            logger.exception("the engine failed")
            self._sink.on_death(error)

    def _take_in(self) -> bool:
        """Handle the inbox, waiting for it while there is nothing to step; False to stop."""
        while True:
            idle = not self.engine.has_work
            if idle:
                self._busy = False
                self.state = self._look()
            # Prompts that wait for another worker are not work, but their deadlines still pass.
            timeout_s = REMOTE_WAIT_S if len(self.engine.scheduler.remote) else None
            try:
                command = self._inbox.get(block=idle, timeout=timeout_s)
            except queue.Empty:
                return True
            if command is None:
                return False
            if not self._busy:
                self._last_progress = time.monotonic()
                self._busy = True
            command()

    def _step(self) -> None:
        counters = self.engine.scheduler.counters
        computed = counters.computed_tokens
        outputs = self.engine.step()
        self._last_progress = time.monotonic()
        self.state = self._look()
        self._hand_out_transfers()
        self._deliver(outputs, counters.computed_tokens - computed, self.engine.step_s)

    def _hand_out_transfers(self) -> None:
        scheduler = self.engine.scheduler
        if scheduler.prefill_needed:
            needed, scheduler.prefill_needed = scheduler.prefill_needed, []
            self._sink.on_prefill_needed(needed)
        if scheduler.blocks_ready:
            ready, scheduler.blocks_ready = scheduler.blocks_ready, []
            self._sink.on_blocks_ready(ready)

    def _add(self, request: EngineRequest) -> None:
        try:
            self.engine.add_request(request)
        except ApiError as error:
            self._sink.on_rejected(request.request_id, error)
        else:
            self._sink.on_added(request)

    def _deliver(self, outputs: list[ChoiceOutput], num_tokens: int, duration_s: float) -> None:
        record = StepRecord(self.engine.scheduler.counters.steps, num_tokens, duration_s)
        self._sink.on_step(record, outputs)

    def _look(self) -> EngineState:
        scheduler = self.engine.scheduler
        blocks = self.engine.pool.counts()
        return EngineState(
            steps=scheduler.counters.steps,
            running=len(scheduler.running.sequences),
            waiting=scheduler.waiting.num_sequences,
            queued_tokens=scheduler.waiting.num_tokens,
            prefill_tokens=scheduler.prefill_tokens,
            rates=self.engine.pace.rates(),
            blocks_free=blocks.free,
            blocks_cached=blocks.cached,
            blocks_owned=blocks.owned,
            blocks_promised=blocks.promised,
            preemptions=scheduler.counters.preemptions,
            cache_queries=scheduler.counters.cache_queries,
            cache_hits=scheduler.counters.cache_hits,
        )
