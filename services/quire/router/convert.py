"""The only place where router types meet proto."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.api.errors import ApiError
from quire.proto import router_pb2
from quire.router.query import RouteQuery
from quire.router.reports import LoadReport, PodModel

if TYPE_CHECKING:
    from quire.proto import worker_pb2
    from quire.router.decisions import Decision, Explanation, PodScore

DEFAULT_EXPECTED_OUTPUT = 256
"""Tokens, when the caller cannot tell."""
DEFAULT_BLOCK_SIZE = 16
LAYOUT_BYTES = 6
"""Of a layout's fingerprint: as many as a double holds exactly."""


def query_from(request: router_pb2.RouteRequest) -> RouteQuery:
    """A question from the wire. Raises ApiError `invalid_value`."""
    try:
        return RouteQuery(
            hashes=request.hashes,
            prompt_len=request.prompt_len,
            model=request.model,
            expected_output=request.expected_output or DEFAULT_EXPECTED_OUTPUT,
            priority=request.priority,
            deadline_s=request.deadline_ms / 1000 if request.HasField("deadline_ms") else None,
            session=request.session,
            request_id=request.request_id,
            exclude=frozenset(request.exclude_pods),
        )
    except ValueError as error:
        raise ApiError("invalid_value", str(error)) from None


def query_to(query: RouteQuery) -> router_pb2.RouteRequest:
    """A question on the wire."""
    request = router_pb2.RouteRequest(
        model=query.model,
        hashes=query.hashes,
        prompt_len=query.prompt_len,
        expected_output=query.expected_output,
        priority=query.priority,
        session=query.session,
        request_id=query.request_id,
        exclude_pods=sorted(query.exclude),
    )
    if query.deadline_s is not None:
        request.deadline_ms = max(0, round(query.deadline_s * 1000))
    return request


def reply_to(decision: Decision) -> router_pb2.RouteReply:
    """A decision on the wire."""
    return router_pb2.RouteReply(
        decode_pod=decision.decode_pod,
        prefill_pod=decision.prefill_pod,
        decode_cached_blocks=decision.decode_cached_blocks,
        prefill_cached_blocks=decision.prefill_cached_blocks,
        decision_id=decision.decision_id,
        expected_ttft_s=decision.expected_ttft_s,
        late=decision.late,
    )


def explanation_to(explanation: Explanation) -> router_pb2.Explanation:
    """An explained decision on the wire."""
    return router_pb2.Explanation(
        decision=reply_to(explanation.decision),
        policy=explanation.decision.policy,
        request_id=explanation.query.request_id,
        prompt_len=explanation.query.prompt_len,
        num_pods=explanation.num_pods,
        scores=[score_to(score) for score in explanation.scores()],
    )


def score_to(score: PodScore) -> router_pb2.PodScore:
    """One pod's score on the wire."""
    pod = score.endpoint
    return router_pb2.PodScore(
        pod=pod.pod,
        eligible=score.eligible,
        costs=[router_pb2.Cost(name=name, value=value) for name, value in score.costs],
        cached_tokens=int(pod.cached_tokens),
        wait_s=pod.wait_s,
        prefill_tokens_per_s=pod.prefill_tokens_per_s,
        running=pod.running,
        itl_s=pod.itl_s,
        blocks_free=pod.blocks_free,
        blocks_cached=pod.blocks_cached,
        suspect=pod.suspect,
        prefill_weight=pod.prefill_weight,
        decode_weight=pod.decode_weight,
    )


def model_from(pod: str, model: worker_pb2.ModelInfo) -> PodModel:
    """What a pod serves."""
    return PodModel(
        pod=pod,
        incarnation=model.incarnation,
        model=model.model,
        block_size=model.block_size or DEFAULT_BLOCK_SIZE,
        num_blocks=model.num_blocks,
        block_bytes=model.block_bytes,
        max_num_seqs=model.max_num_seqs or 1,
        kv_layout=int.from_bytes(model.kv.fingerprint[:LAYOUT_BYTES]),
    )


def load_from(load: worker_pb2.Load) -> LoadReport:
    """How busy a pod is. A pod of an older version reports neither rates nor role."""
    return LoadReport(
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.queued_tokens,
        prefilling_tokens=max(load.prefill_tokens - load.queued_tokens, 0),
        blocks_free=load.blocks_free,
        blocks_cached=load.blocks_cached,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        itl_s=load.itl_s,
        itl_slope_s=load.itl_slope_s,
        prefill_weight=load.prefill_weight if load.HasField("prefill_weight") else 1.0,
        decode_weight=load.decode_weight if load.HasField("decode_weight") else 1.0,
        draining=load.draining,
        transfer_rates=tuple((r.peer, r.bytes_per_s) for r in load.transfer_rates),
    )
