"""The engine: requests in, tokens out, one step at a time.

    add_request / abort  ->  scheduler.schedule() -> StepPlan -> runner.launch(plan) ...
                         ... wait() -> StepResult -> scheduler.update() -> ChoiceOutputs

With async scheduling a step runs while the next is planned: a call of `step` launches step n + 1
and then waits for step n, whose outputs the caller hands on while n + 1 runs. Without, it waits for
the step that it launched. Nothing else differs.

Single-threaded: whoever owns the engine calls everything from one thread. `LLM` steps it in the
caller's thread; a worker gives it a thread of its own (`loop.py`).
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from quire.api import block_hash
from quire.api.errors import ApiError
from quire.api.sampling import check_token_ids
from quire.engine.kv.pool import BlockPool
from quire.engine.pace import Pace
from quire.engine.request import EngineRequest, FinishReason, RequestState, Sequence
from quire.engine.runner.load import load_model
from quire.engine.runner.memory import give_back
from quire.engine.scheduler.limits import SchedulerLimits
from quire.engine.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.config.engine import EngineConfig
    from quire.engine.output import ChoiceOutput
    from quire.engine.parallel.spread import Spread
    from quire.engine.runner.load import LoadedModel, Report
    from quire.engine.scheduler.batch import ScheduledStep
    from quire.engine.scheduler.plan import StepResult

RETRY_BOUNDS_S = (1.0, 30.0)


class _Launched(NamedTuple):
    """A step under way."""

    scheduled: ScheduledStep
    wait: Callable[[], StepResult]
    began: float
    """time.monotonic() when its planning began."""


class Engine:
    """One model, its KV pool and its scheduler."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.model = loaded
        self.runner = loaded.runner
        self.pool = BlockPool(loaded.runner.num_blocks, caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=loaded.max_model_len,
                max_logit_rows=loaded.runner.limits.max_logit_rows,
                vocab_size=loaded.config.vocab_size,
                watermark_blocks=int(config.watermark * loaded.runner.num_blocks),
            ),
        )
        self.pace = Pace()
        self.step_s = 0.0
        """Seconds that the last finished step took, or made the ones before it longer by."""
        self._ahead = int(loaded.async_scheduling)
        """Steps that may be under way when `step` returns."""
        self._launched: deque[_Launched] = deque()
        self._landed = 0.0

    @classmethod
    def load(cls, config: EngineConfig, report: Report, spread: Spread | None = None) -> Engine:
        """Load the model and build the engine. Raises ValueError with one line for the user,
        OSError for an address of `spread` that cannot be listened on."""
        return cls(config, load_model(config, report, spread))

    @property
    def has_work(self) -> bool:
        """A request is waiting or running, or a step under way."""
        return self.scheduler.has_work

    def add_request(self, request: EngineRequest) -> None:
        """Check a request and queue it.

        Raises ApiError: a 400 when it can never be served, `overloaded` (503 with Retry-After) when
        the queue is full. Either way nothing of it stays behind.
        """
        self._check(request)
        self._check_queue(request)
        params = request.params
        prompt = request.prompt_token_ids
        room = self.model.max_model_len - len(prompt)
        priority = request.priority if self.config.scheduling_policy == "priority" else 0
        state = RequestState(
            request=request,
            max_tokens=_max_tokens(request, room),
            stop_token_ids=self._stop_ids(request),
            is_remote=request.remote is not None,
            order=(priority, time.monotonic()),
        )
        root = block_hash.root(self.model.fingerprint, salt=request.cache_salt)
        if request.resumed:
            resumed = sorted(request.resumed.items())
            sequences = [Sequence(state, i, prompt + tokens, root) for i, tokens in resumed]
        else:
            sequences = [Sequence(state, 0, list(prompt), root)]
            sequences[0].num_forks = params.n - 1
        self.scheduler.add(state, sequences)
        if request.is_exported:
            self.scheduler.exports.open(request.request_id)

    def abort(self, request_id: str, choice: int | None = None) -> list[ChoiceOutput]:
        """End a request, or one choice of it, wherever it is. Unknown ones are ignored: they may
        just have finished."""
        return self.scheduler.finish_request(request_id, FinishReason.ABORT, choice)

    def step(self) -> list[ChoiceOutput]:
        """Plan and launch the next step, if there is one to plan; then wait for the oldest under
        way, unless it may run beside the next plan. Returns what that step gave to whom."""
        began = time.monotonic()
        outputs = self.scheduler.expire(began)
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            self._launched.append(_Launched(scheduled, self.runner.launch(scheduled.plan), began))
        if scheduled is None or len(self._launched) > self._ahead:
            outputs += self._land()
        return outputs

    def _land(self) -> list[ChoiceOutput]:
        """Wait for the oldest step under way, if any, and take in its result."""
        if not self._launched:
            return []
        step = self._launched.popleft()
        outputs = self.scheduler.update(step.scheduled, step.wait())
        # steps under way at once overlap: from the end of the one before
        began, self._landed = max(step.began, self._landed), time.monotonic()
        self.step_s = self._landed - began
        decodes = step.scheduled.num_decodes
        self.pace.note_step(decodes, step.scheduled.plan.num_tokens - decodes, self.step_s)
        return outputs

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix; returns how many blocks were."""
        return self.pool.reset_cache()

    def drop_cache(self) -> int:
        """Forget every cached prefix and give the pool's memory, on every rank, back to the system,
        which returns it, zeroed, as it is written to. Returns the bytes given back.

        Nothing may be held. Raises ValueError where the pool is not in host memory.
        """
        pool = self.model.runner.backend.host_pool()
        if pool is None:
            raise ValueError("only a KV cache in host memory can be dropped so far")
        if self.pool.counts().owned:
            raise AssertionError("blocks are held")
        self.pool.reset_cache()
        of_others = 0 if self.model.gang is None else self.model.gang.drop_caches()
        return give_back(pool) + of_others

    def _stop_ids(self, request: EngineRequest) -> frozenset[int]:
        eos = () if request.params.ignore_eos else self.model.config.eos_token_ids
        return frozenset(eos) | frozenset(request.params.stop_token_ids)

    def _check(self, request: EngineRequest) -> None:
        prompt, params = request.prompt_token_ids, request.params
        vocab_size, limit = self.model.config.vocab_size, self.model.max_model_len
        if not prompt:
            raise ApiError("invalid_value", "The prompt has no tokens.", "prompt")
        if max(prompt) >= vocab_size or min(prompt) < 0:
            message = f"The prompt names a token outside the vocabulary of {vocab_size}."
            raise ApiError("integer_above_max_value", message, "prompt")
        check_token_ids(params, vocab_size)
        longest = max((len(tokens) for tokens in request.resumed.values()), default=0)
        if len(prompt) + longest >= limit:
            message = (
                f"This model's maximum context length is {limit} tokens. However, your request "
                f"has {len(prompt)} input tokens, which leaves no room for output."
            )
            raise ApiError("context_length_exceeded", message, "prompt")
        if params.n > self.config.max_num_seqs:
            message = f"'n' is {params.n}; this engine runs {self.config.max_num_seqs} sequences."
            raise ApiError("integer_above_max_value", message, "n")
        if self.scheduler.has_request(request.request_id):
            raise ApiError("invalid_value", "A request with this id is running.", "request_id")
        if any(not 0 <= choice < params.n for choice in request.resumed):
            raise ApiError("invalid_value", "'resumed' names a choice beyond 'n'.", "resumed")

    def _check_queue(self, request: EngineRequest) -> None:
        waiting = self.scheduler.waiting
        tokens = waiting.num_tokens + len(request.prompt_token_ids)
        full = waiting.num_sequences >= self.config.max_num_queued_reqs
        if full or (waiting.num_sequences and tokens > self.config.max_num_queued_tokens):
            message = "The server is overloaded. Please retry."
            raise ApiError("overloaded", message, retry_after_s=self._retry_after())

    def _retry_after(self) -> float:
        """Seconds until half of the queue is worked off at the measured rate."""
        low, high = RETRY_BOUNDS_S
        rate = self.pace.rates().prefill_tokens_per_s
        return min(max(self.scheduler.waiting.num_tokens / 2 / rate, low), high) if rate else low


def _max_tokens(request: EngineRequest, room: int) -> int:
    """Most output tokens of a choice: for another pod's prompt, the first token alone."""
    if request.is_exported:
        return 1
    asked = request.params.max_tokens
    return room if asked is None else min(asked, room)
