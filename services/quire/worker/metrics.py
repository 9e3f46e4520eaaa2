"""Feeds the engine's metrics from what the engine loop reports. Runs on the engine thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.engine.request import FinishReason
from quire.telemetry import metrics as m
from quire.worker.transfer_metrics import show_transfers

if TYPE_CHECKING:
    from quire.api.errors import ApiError
    from quire.engine.loop import EngineState, StepRecord
    from quire.engine.output import Admission, ChoiceOutput
    from quire.engine.parallel.gang import Gang
    from quire.engine.request import EngineRequest
    from quire.telemetry.instruments import Instruments
    from quire.transfer.base import Counters


@dataclass(slots=True)
class _Live:
    """A request between its admission to the queue and its last token."""

    request: EngineRequest
    admission: Admission | None = None
    first_token: float = 0.0
    num_tokens: int = 0
    last_token: dict[int, float] = field(default_factory=dict)
    """Per choice: when its newest token came."""


class EngineMetrics:
    """Turns steps and finished requests into observations."""

    def __init__(self, instruments: Instruments) -> None:
        self._live: dict[str, _Live] = {}
        self._instruments = instruments
        self._transfers: Counters | None = None
        get = self._get = instruments.get
        self._steps, self._step_tokens = get(m.STEPS), get(m.STEP_TOKENS)
        self._step_duration = get(m.STEP_DURATION)
        self._generated, self._prompt = get(m.GENERATION_TOKENS), get(m.PROMPT_TOKENS)
        self._itl, self._ttft = get(m.INTER_TOKEN_LATENCY), get(m.TIME_TO_FIRST_TOKEN)
        self._preemptions = get(m.PREEMPTIONS)
        self._queries, self._hits = get(m.PREFIX_CACHE_QUERIES), get(m.PREFIX_CACHE_HITS)

    def added(self, request: EngineRequest) -> None:
        """A request was queued."""
        self._live[request.request_id] = _Live(request)

    def rejected(self, error: ApiError) -> None:
        """A request was refused."""
        reason = "queue_requests" if error.code == "overloaded" else "invalid"
        self._get(m.ADMISSION_REJECTIONS, reason).inc()

    def step(self, record: StepRecord, outputs: list[ChoiceOutput]) -> None:
        """A step finished, or requests ended."""
        if record.num_tokens:
            self._steps.inc()
            self._step_tokens.observe(record.num_tokens)
            self._step_duration.observe(record.duration_s)
        now = time.monotonic()
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is not None:
                self._observe(live, output, now)

    def moved_here(self, request: EngineRequest, num_blocks: int) -> None:
        """A request came from another worker, with this many blocks of its own."""
        how = "kv" if num_blocks else "recompute"
        self._get(m.MIGRATED_SEQUENCES, how).inc(max(len(request.resumed), 1))
        self._get(m.MIGRATED_BLOCKS).inc(num_blocks)

    def show_transfers(self, counters: Counters) -> None:
        """KV blocks are exchanged with other workers: counted here, shown with the rest."""
        self._transfers = counters

    def state(self, state: EngineState, step_age_s: float) -> None:
        """Gauges, set when scraped."""
        get = self._get
        blocks = state.blocks_free + state.blocks_cached + state.blocks_owned
        get(m.REQUESTS_RUNNING).set(state.running)
        get(m.REQUESTS_WAITING).set(state.waiting)
        get(m.QUEUED_TOKENS).set(state.queued_tokens)
        get(m.KV_CACHE_USAGE).set(state.blocks_owned / blocks)
        get(m.KV_BLOCKS, "free").set(state.blocks_free)
        get(m.KV_BLOCKS, "cached").set(state.blocks_cached)
        get(m.KV_BLOCKS, "owned").set(state.blocks_owned)
        get(m.KV_PROMISED_BLOCKS).set(state.blocks_promised)
        get(m.STEP_AGE).set(step_age_s)
        self._preemptions.value = state.preemptions
        self._queries.value = state.cache_queries
        self._hits.value = state.cache_hits
        if self._transfers is not None:
            show_transfers(self._instruments, self._transfers)

    def ranks(self, gang: Gang) -> None:
        """The other ranks of a tensor-parallel engine, set when scraped."""
        now = time.monotonic()
        for member in gang.members():
            rank, vitals = str(member.rank), member.vitals
            self._get(m.RANK_STEPS, rank).value = vitals.steps
            self._get(m.RANK_SILENCE, rank).set(now - member.heard)
            self._get(m.RANK_MEMORY, rank, "host").set(vitals.host_bytes)
            self._get(m.RANK_MEMORY, rank, "device").set(vitals.device_bytes)

    def _observe(self, live: _Live, output: ChoiceOutput, now: float) -> None:
        count = len(output.token_ids)
        if output.admission is not None:
            self._admitted(live, output.admission, now)
        elif count and output.choice in live.last_token:
            self._itl.observe(now - live.last_token[output.choice])
        if count:
            live.last_token[output.choice] = now
            live.num_tokens += count
            self._generated.inc(count)
        if output.last_of_request:
            del self._live[output.request_id]
            self._finished(live, output.finish_reason, now)

    def _admitted(self, live: _Live, admission: Admission, now: float) -> None:
        live.admission = admission
        live.first_token = now
        num_prompt = len(live.request.prompt_token_ids)
        self._ttft.observe(admission.queue_s + admission.prefill_s)
        self._prompt.inc(num_prompt)
        moved = admission.transferred_tokens
        computed = num_prompt - admission.cached_tokens - moved
        self._get(m.PROMPT_TOKENS_BY_SOURCE, "local_compute").inc(computed)
        self._get(m.PROMPT_TOKENS_BY_SOURCE, "local_cache_hit").inc(admission.cached_tokens)
        self._get(m.PROMPT_TOKENS_BY_SOURCE, "external_kv_transfer").inc(moved)
        self._get(m.REQUEST_COMPUTED_TOKENS).observe(computed)

    def _finished(self, live: _Live, reason: FinishReason | None, now: float) -> None:
        known = {
            FinishReason.STOP: "stop",
            FinishReason.LENGTH: "length",
            FinishReason.ERROR: "error",
        }
        ended = "abort" if reason is None else known.get(reason, "abort")
        get = self._get
        get(m.REQUESTS_FINISHED, ended).inc()
        get(m.REQUEST_PROMPT_TOKENS).observe(len(live.request.prompt_token_ids))
        get(m.REQUEST_GENERATION_TOKENS).observe(live.num_tokens)
        get(m.REQUEST_PARAMS_N).observe(live.request.params.n)
        if live.request.params.max_tokens is not None:
            get(m.REQUEST_PARAMS_MAX_TOKENS).observe(live.request.params.max_tokens)
        if live.admission is None:
            return
        decode_s = now - live.first_token
        get(m.REQUEST_QUEUE_TIME).observe(live.admission.queue_s)
        get(m.REQUEST_PREFILL_TIME).observe(live.admission.prefill_s)
        get(m.REQUEST_DECODE_TIME).observe(decode_s)
        get(m.REQUEST_INFERENCE_TIME).observe(live.admission.prefill_s + decode_s)
        before = live.admission.queue_s + live.admission.prefill_s
        get(m.REQUEST_LATENCY).observe(before + decode_s)
        per_choice = live.num_tokens / live.request.params.n - 1
        if per_choice > 0:
            get(m.TIME_PER_OUTPUT_TOKEN).observe(decode_s / per_choice)
