"""Between the wire's messages and the engine's types, both ways. The only place that knows both."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from quire.api.sampling import SamplingParams
from quire.engine.output import TokenLogprob
from quire.engine.request import EngineRequest, FinishReason
from quire.engine.scheduler.scheduler import DrawnToken
from quire.proto import common_pb2, worker_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.api.errors import ApiError
    from quire.engine.engine import Engine
    from quire.engine.kv.pool import CacheDigest, CacheEvent
    from quire.engine.loop import EngineState
    from quire.engine.output import Admission, ChoiceOutput
    from quire.engine.runner.load import Startup
    from quire.worker.standing import Standing

_FINISH = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
}

_FAILURE = worker_pb2.Failure
_FAILURE_CODES = {"overloaded": _FAILURE.CODE_OVERLOADED, "not_ready": _FAILURE.CODE_NOT_READY}


def request_from(submit: worker_pb2.Submit, request_id: str) -> EngineRequest:
    """The engine's request. Raises ApiError when a parameter is out of range: the gateway has
    checked it, but a worker does not rely on that."""
    resumed = {entry.choice: list(entry.token_ids) for entry in submit.resumed}
    return replace(_request(submit, request_id), resumed=resumed)


def export_from(request: worker_pb2.PrefillRequest, request_id: str) -> EngineRequest:
    """The engine's request for a prompt whose blocks another worker wants. Raises ApiError."""
    return replace(_request(request, request_id), is_exported=True)


def _request(
    message: worker_pb2.Submit | worker_pb2.PrefillRequest, request_id: str
) -> EngineRequest:
    """What both messages say in the same fields."""
    deadline = None
    if message.HasField("timeout_ms"):
        deadline = time.monotonic() + message.timeout_ms / 1000
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(message.prompt_token_ids),
        params=sampling_from(message.sampling),
        seed=message.sampling.seed,
        priority=message.priority,
        deadline=deadline,
        cache_salt=message.cache_salt,
    )


def first_tokens_to(first: dict[int, ChoiceOutput]) -> worker_pb2.FirstTokens:
    """The first output of each choice, by choice, as it travels in a commit."""
    message = worker_pb2.FirstTokens()
    for choice in sorted(first):
        drawn = message.choices.add(token_id=first[choice].token_ids[0])
        if first[choice].logprobs:
            drawn.logprob.CopyFrom(logprob_to(first[choice].logprobs[0]))
    admission = next((o.admission for o in first.values() if o.admission is not None), None)
    if admission is not None:
        message.cached_tokens = admission.cached_tokens
        message.queue_s = admission.inbox_s + admission.queue_s
        message.prefill_s = admission.prefill_s
    return message


def drawn_from(message: worker_pb2.FirstTokens) -> list[DrawnToken]:
    """The first token of each choice."""
    drawn = []
    for choice in message.choices:
        logprob = logprob_from(choice.logprob) if choice.HasField("logprob") else None
        drawn.append(DrawnToken(choice.token_id, logprob))
    return drawn


def logprob_from(message: common_pb2.TokenLogprob) -> TokenLogprob:
    """One token's log-probability."""
    return TokenLogprob(
        message.logprob, message.rank, list(message.top_ids), list(message.top_logprobs)
    )


def sampling_from(message: common_pb2.Sampling) -> SamplingParams:
    """Sampling parameters; absent optional fields take the neutral value."""

    def given(name: str) -> bool:
        return message.HasField(name)  # type: ignore[arg-type]

    return SamplingParams(
        n=message.n or 1,
        max_tokens=message.max_tokens if given("max_tokens") else None,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if given("top_p") else 1.0,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if given("repetition_penalty") else 1.0,
        seed=message.seed,
        stop_token_ids=list(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        allowed_token_ids=list(message.allowed_token_ids) or None,
        bad_words_ids=[list(word.ids) for word in message.bad_words],
        logprobs=message.logprobs if given("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if given("prompt_logprobs") else None,
    )


def output_to(output: ChoiceOutput, request: int, attempt: int) -> worker_pb2.ChoiceOutput:
    """One choice's share of a step."""
    message = worker_pb2.ChoiceOutput(
        request=request,
        attempt=attempt,
        choice=output.choice,
        position=output.position,
        token_ids=output.token_ids,
    )
    if output.logprobs:
        message.logprobs.extend(logprob_to(entry) for entry in output.logprobs)
    if output.finish_reason is not None:
        message.finish_reason = _FINISH[output.finish_reason]
        if output.stop_token_id is not None:
            message.stop_token_id = output.stop_token_id
    if output.admission is not None:
        message.admission.CopyFrom(admission_to(output.admission))
        message.prompt_logprobs.extend(logprob_to(entry) for entry in output.prompt_logprobs)
    return message


def admission_to(admission: Admission) -> worker_pb2.Admission:
    """What happened before the first token; to be called when it is written to the session."""
    message = worker_pb2.Admission(
        cached_tokens=admission.cached_tokens,
        queue_s=admission.queue_s,
        prefill_s=admission.prefill_s,
        inbox_s=admission.inbox_s,
        handout_s=time.monotonic() - admission.first_token,
    )
    if (remote := admission.remote) is not None:
        message.remote.CopyFrom(
            worker_pb2.RemotePrefill(
                worker=remote.worker,
                failed=remote.failed,
                ask_s=remote.ask_s,
                queue_s=remote.queue_s,
                prefill_s=remote.prefill_s,
                transfer_s=remote.transfer_s,
                commit_s=remote.commit_s,
                resume_s=remote.resume_s,
                cached_tokens=remote.cached_tokens,
            )
        )
        for after_s, blocks in remote.arrivals:
            message.remote.arrivals.add(after_s=after_s, blocks=blocks)
    return message


def logprob_to(entry: TokenLogprob) -> common_pb2.TokenLogprob:
    """One token's log-probability."""
    return common_pb2.TokenLogprob(
        logprob=entry.logprob,
        rank=entry.rank,
        top_ids=entry.top_ids,
        top_logprobs=entry.top_logprobs,
    )


def failure_to(error: ApiError, request: int, attempt: int) -> worker_pb2.Failure:
    """A refused request."""
    code = _FAILURE_CODES.get(error.code)
    if code is None:
        code = _FAILURE.CODE_INVALID if error.status < 500 else _FAILURE.CODE_INTERNAL
    return worker_pb2.Failure(
        request=request,
        attempt=attempt,
        code=code,
        message=error.message,
        retry_after_ms=int((error.retry_after_s or 0) * 1000),
    )


def startup_to(startup: Startup) -> worker_pb2.Startup:
    """Where loading stands."""
    return worker_pb2.Startup(
        phase=startup.phase,
        detail=startup.detail,
        done=startup.done,
        total=startup.total,
        unit=startup.unit,
    )


def model_info(engine: Engine, incarnation: int) -> worker_pb2.ModelInfo:
    """The facts a gateway needs about the loaded model."""
    model = engine.model
    return worker_pb2.ModelInfo(
        model=engine.config.model,
        architecture=model.config.architecture,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        vocab_size=model.config.vocab_size,
        block_size=engine.config.block_size,
        num_blocks=engine.pool.num_blocks,
        block_bytes=model.runner.backend.layout.block_bytes,
        fingerprint=model.fingerprint,
        eos_token_ids=model.config.eos_token_ids,
        max_num_seqs=engine.config.max_num_seqs,
        incarnation=incarnation,
        device=model.device,
        numerics=model.numerics,
    )


def load_to(state: EngineState, step_age_s: float) -> worker_pb2.Load:
    """How busy the engine is."""
    return worker_pb2.Load(
        step=state.steps,
        running=state.running,
        waiting=state.waiting,
        queued_tokens=state.queued_tokens,
        blocks_free=state.blocks_free,
        blocks_cached=state.blocks_cached,
        blocks_owned=state.blocks_owned,
        step_age_s=step_age_s,
        prefill_tokens=state.prefill_tokens,
        prefill_tokens_per_s=state.rates.prefill_tokens_per_s,
        itl_s=state.rates.itl_s,
        itl_slope_s=state.rates.itl_slope_s,
    )


T = TypeVar("T", worker_pb2.Load, worker_pb2.HealthReport)


def with_standing(message: T, standing: Standing) -> T:
    """The message, with what the worker is there for at the moment."""
    message.prefill_weight = standing.weights.prefill
    message.decode_weight = standing.weights.decode
    message.sleeping = standing.is_sleeping
    message.draining = standing.is_draining
    if isinstance(message, worker_pb2.Load):  # there it says: send no requests, whatever the reason
        message.draining = standing.refusal() is not None
    return message


def describe_engine(report: worker_pb2.HealthReport, state: EngineState, step_age_s: float) -> None:
    """Fill in how the engine is."""
    report.step_age_s, report.steps = step_age_s, state.steps
    report.running, report.waiting = state.running, state.waiting
    report.blocks_owned = state.blocks_owned


def cache_digest_to(digest: CacheDigest, incarnation: int) -> worker_pb2.CacheDigest:
    """The fingerprint of the prefix cache."""
    return worker_pb2.CacheDigest(
        incarnation=incarnation,
        sequence=digest.sequence,
        count=digest.count,
        hash_xor=digest.hash_xor,
    )


def cache_event_to(event: CacheEvent) -> worker_pb2.CacheEvent:
    """One change of the prefix cache."""
    if event.block_hash is None:
        return worker_pb2.CacheEvent(kind=worker_pb2.CacheEvent.KIND_CLEARED)
    if not event.stored:
        removed = worker_pb2.CacheEvent.KIND_REMOVED
        return worker_pb2.CacheEvent(kind=removed, block_hash=event.block_hash)
    return stored_event(event.block_hash, event.parent or b"")


def stored_event(block_hash: bytes, parent: bytes) -> worker_pb2.CacheEvent:
    """A block that can be found under its hash."""
    return worker_pb2.CacheEvent(
        kind=worker_pb2.CacheEvent.KIND_STORED, block_hash=block_hash, parent_hash=parent
    )


def stored_events(blocks: Iterable[tuple[bytes, bytes]]) -> list[worker_pb2.CacheEvent]:
    """A snapshot: (hash, parent) of every findable block."""
    return [stored_event(block_hash, parent) for block_hash, parent in blocks]
