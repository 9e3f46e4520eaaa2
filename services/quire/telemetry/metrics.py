"""Every Prometheus metric of Quire, declared once.

Dashboards, alerts, autoscaler queries and docs/metrics.md are made from or checked against this
list. Names follow Prometheus conventions under `quire_`; the engine's carry vLLM's name as an
alias where one exists, so that existing dashboards and autoscalers work. A gateway never exports
`vllm:` names: a sum over pods would count twice.

    instruments = engine_instruments(registry, model_name="demo", engine="0")
    running = instruments.get(REQUESTS_RUNNING)         # keep it; get() is a look-up
    running.set(3)
    instruments.get(REQUESTS_FINISHED, "stop").inc()
    instruments.get(INTER_TOKEN_LATENCY).observe(0.012, count=64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.telemetry.instruments import (
    CounterDeclaration,
    Declaration,
    GaugeDeclaration,
    HistogramDeclaration,
    InfoDeclaration,
    Instruments,
)

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

# ---- Buckets: vLLM's, so that panels and objectives line up, and finer ones below


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to and including the limit."""
    values = (float(m * 10**e) for e in range(len(str(limit))) for m in (1, 2, 5))
    return tuple(v for v in values if v <= limit)


FIRST_TOKEN_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_LATENCY_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,
    0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0,
    15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_BUCKETS = (
    0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1,
    0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
TOKENIZE_BUCKETS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
)  # fmt: skip
DECISION_BUCKETS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
)  # fmt: skip
STEP_TOKEN_BUCKETS = tuple(float(1 << i) for i in range(15))
TOKEN_COUNT_BUCKETS = one_two_five(1_000_000)
CHOICE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)

# ---- Engine: what it holds now

REQUESTS_RUNNING = GaugeDeclaration(
    name="quire_requests_running", unit="requests", component="engine",
    help="Requests in the running batch.",
    aliases=("vllm:num_requests_running",),
)  # fmt: skip
REQUESTS_WAITING = GaugeDeclaration(
    name="quire_requests_waiting", unit="requests", component="engine",
    help="Requests admitted to the queue and not yet running.",
    aliases=("vllm:num_requests_waiting",),
)  # fmt: skip
QUEUED_TOKENS = GaugeDeclaration(
    name="quire_queued_tokens", unit="tokens", component="engine",
    help="Prompt tokens of the waiting requests.",
)  # fmt: skip
KV_CACHE_USAGE = GaugeDeclaration(
    name="quire_kv_cache_usage_ratio", unit="ratio", component="engine",
    help="Share of KV blocks that a request owns, 0 to 1.",
    aliases=("vllm:kv_cache_usage_perc",),
)  # fmt: skip
KV_BLOCKS = GaugeDeclaration(
    name="quire_kv_blocks", unit="blocks", component="engine",
    help="KV blocks by state; the states sum to the pool.",
    labels=("state",), values=(("free", "cached", "owned"),),
)  # fmt: skip
CACHE_CONFIG = InfoDeclaration(
    name="quire_cache_config_info", component="engine",
    help="Shape of the KV cache.",
    labels=("block_size", "num_blocks", "block_bytes", "enable_prefix_caching"),
    aliases=("vllm:cache_config_info",), alias_labels=(("num_blocks", "num_gpu_blocks"),),
)  # fmt: skip
MODEL_INFO = InfoDeclaration(
    name="quire_model_info", component="engine",
    help="The loaded model.",
    labels=("model", "architecture", "dtype", "device", "max_model_len"),
)  # fmt: skip
STARTUP_SECONDS = GaugeDeclaration(
    name="quire_startup_seconds", unit="seconds", component="engine",
    help="Time that each start-up phase took.",
    labels=("phase",),
)  # fmt: skip

# ---- Engine: steps

STEPS = CounterDeclaration(
    name="quire_steps", unit="steps", component="engine",
    help="Finished steps.",
)  # fmt: skip
STEP_DURATION = HistogramDeclaration(
    name="quire_step_duration_seconds", unit="seconds", component="engine",
    help="Time of a step, scheduling and sampling included.", buckets=STEP_BUCKETS,
)  # fmt: skip
STEP_TOKENS = HistogramDeclaration(
    name="quire_step_tokens", unit="tokens", component="engine",
    help="Tokens computed in a step, prompt and output together.", buckets=STEP_TOKEN_BUCKETS,
    aliases=("vllm:iteration_tokens_total",),
)  # fmt: skip
STEP_AGE = GaugeDeclaration(
    name="quire_step_age_seconds", unit="seconds", component="engine",
    help="Time without progress while work is pending, else 0.",
)  # fmt: skip
RANK_STEPS = CounterDeclaration(
    name="quire_rank_steps", unit="steps", component="engine",
    help="Engine steps that a rank beyond the first has executed.", labels=("rank",),
)  # fmt: skip
RANK_SILENCE = GaugeDeclaration(
    name="quire_rank_silence_seconds", unit="seconds", component="engine",
    help="Since a rank beyond the first gave a sign of life; after 5 s it counts as lost, and the "
    "engine with it.",
    labels=("rank",),
)  # fmt: skip
RANK_MEMORY = GaugeDeclaration(
    name="quire_rank_memory_bytes", unit="bytes", component="engine",
    help="Memory of a rank beyond the first: `host` is what its process has resident, `device` "
    "what it has reserved of its GPU.",
    labels=("rank", "of"),
)  # fmt: skip
PREEMPTIONS = CounterDeclaration(
    name="quire_preemptions", unit="requests", component="engine",
    help="Running requests sent back to the queue for want of KV blocks.",
    aliases=("vllm:num_preemptions",),
)  # fmt: skip
MIGRATED_SEQUENCES = CounterDeclaration(
    name="quire_migrated_sequences", unit="sequences", component="engine",
    help="Sequences taken over from a draining worker: with blocks of it, or computed again.",
    labels=("how",), values=(("kv", "recompute"),),
)  # fmt: skip
MIGRATED_BLOCKS = CounterDeclaration(
    name="quire_migrated_blocks", unit="blocks", component="engine",
    help="KV blocks that came with such sequences.",
)  # fmt: skip

# ---- Engine: KV blocks exchanged with other workers; peers are workers, by their stable names

KV_TRANSFERS = CounterDeclaration(
    name="quire_kv_transfers", unit="transfers", component="engine",
    help="KV transfers that ended. Outcome: committed, or why not: cancelled, peer_cancelled, "
    "lease (nothing heard or moved in time), lost, checksum, incomplete, fenced, incompatible, "
    "unreachable, protocol. Peer unknown: none showed up; transport none: none led there.",
    labels=("direction", "peer", "transport", "outcome"),
)  # fmt: skip
KV_TRANSFER_BYTES = CounterDeclaration(
    name="quire_kv_transfer_bytes", unit="bytes", component="engine",
    help="Bytes of KV blocks sent, repetitions included, and received, verified ones only.",
    labels=("direction", "peer", "transport"),
)  # fmt: skip
KV_TRANSFER_BLOCKS = CounterDeclaration(
    name="quire_kv_transfer_blocks", unit="blocks", component="engine",
    help="KV blocks of committed transfers.",
    labels=("direction", "peer", "transport"),
)  # fmt: skip
KV_TRANSFER_BUSY = CounterDeclaration(
    name="quire_kv_transfer_busy_seconds", unit="seconds", component="engine",
    help="Time with bytes sent to the peer and not acknowledged: bytes sent over it are the speed.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_TRANSFER_EXPOSED = CounterDeclaration(
    name="quire_kv_transfer_exposed_seconds", unit="seconds", component="engine",
    help="Time from the end of a prompt to the peer's confirmation of its last block: what of "
    "transfers to it the prefill did not hide.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_DAMAGED_PIECES = CounterDeclaration(
    name="quire_kv_damaged_pieces", unit="pieces", component="engine",
    help="Parts of blocks that arrived with a wrong checksum; each is asked for again once.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_REPEATED_PIECES = CounterDeclaration(
    name="quire_kv_repeated_pieces", unit="pieces", component="engine",
    help="Parts of blocks that the peer asked for again.",
    labels=("peer", "transport"),
)  # fmt: skip
KV_RECEIVE_RATE = GaugeDeclaration(
    name="quire_kv_receive_bytes_per_second", unit="bytes/s", component="engine",
    help="Speed at which the peer's blocks reach this worker, as it measured: what routers use.",
    labels=("peer",),
)  # fmt: skip
KV_LINKS = CounterDeclaration(
    name="quire_kv_links", unit="links", component="engine",
    help="Connections for KV blocks that were made, probes included.",
    labels=("transport",),
)  # fmt: skip
KV_REFUSED_LINKS = CounterDeclaration(
    name="quire_kv_refused_links", unit="links", component="engine",
    help="Connections that were refused: the token was not proved, another layout or version.",
)  # fmt: skip
KV_FENCED_FRAMES = CounterDeclaration(
    name="quire_kv_fenced_frames", unit="frames", component="engine",
    help="Frames thrown away unread: of transfers that are over, or of another process.",
)  # fmt: skip
KV_QUARANTINED_BYTES = GaugeDeclaration(
    name="quire_kv_quarantined_bytes", unit="bytes", component="engine",
    help="Landing memory that a lost peer's one-sided writes may still reach, not used again.",
)  # fmt: skip

# ---- Engine: tokens

PROMPT_TOKENS = CounterDeclaration(
    name="quire_prompt_tokens", unit="tokens", component="engine",
    help="Prompt tokens of requests whose prompt is done, cached ones included.",
    aliases=("vllm:prompt_tokens",),
)  # fmt: skip
PROMPT_TOKENS_BY_SOURCE = CounterDeclaration(
    name="quire_prompt_tokens_by_source", unit="tokens", component="engine",
    help="Prompt tokens by where their keys and values came from.",
    labels=("source",), values=(("local_compute", "local_cache_hit", "external_kv_transfer"),),
    aliases=("vllm:prompt_tokens_by_source",),
)  # fmt: skip
GENERATION_TOKENS = CounterDeclaration(
    name="quire_generation_tokens", unit="tokens", component="engine",
    help="Tokens generated.",
    aliases=("vllm:generation_tokens",),
)  # fmt: skip
PREFIX_CACHE_QUERIES = CounterDeclaration(
    name="quire_prefix_cache_queries", unit="tokens", component="engine",
    help="Prompt tokens looked up in the prefix cache.",
    aliases=("vllm:prefix_cache_queries",),
)  # fmt: skip
PREFIX_CACHE_HITS = CounterDeclaration(
    name="quire_prefix_cache_hits", unit="tokens", component="engine",
    help="Prompt tokens found in the prefix cache.",
    aliases=("vllm:prefix_cache_hits", "vllm:prompt_tokens_cached"),
)  # fmt: skip

# ---- Engine: requests, observed when they finish

REQUESTS_FINISHED = CounterDeclaration(
    name="quire_requests_finished", unit="requests", component="engine",
    help="Finished requests by reason.",
    labels=("finished_reason",), values=(("stop", "length", "abort", "error"),),
    aliases=("vllm:request_success",),
)  # fmt: skip
ADMISSION_REJECTIONS = CounterDeclaration(
    name="quire_admission_rejections", unit="requests", component="engine",
    help="Requests refused before any work was done on them.",
    labels=("reason",),
    values=(("queue_requests", "queue_tokens", "deadline", "not_ready", "invalid"),),
    aliases=("vllm:admission_rejections",),
)  # fmt: skip
TIME_TO_FIRST_TOKEN = HistogramDeclaration(
    name="quire_time_to_first_token_seconds", unit="seconds", component="engine",
    help="Received to first token.", buckets=FIRST_TOKEN_BUCKETS,
    aliases=("vllm:time_to_first_token_seconds",),
)  # fmt: skip
INTER_TOKEN_LATENCY = HistogramDeclaration(
    name="quire_inter_token_latency_seconds", unit="seconds", component="engine",
    help="Time between two tokens of a sequence.", buckets=TOKEN_LATENCY_BUCKETS,
    aliases=("vllm:inter_token_latency_seconds",),
)  # fmt: skip
TIME_PER_OUTPUT_TOKEN = HistogramDeclaration(
    name="quire_time_per_output_token_seconds", unit="seconds", component="engine",
    help="Mean time per token of a request, the first excluded.", buckets=TOKEN_LATENCY_BUCKETS,
    aliases=("vllm:request_time_per_output_token_seconds",),
)  # fmt: skip
REQUEST_LATENCY = HistogramDeclaration(
    name="quire_request_latency_seconds", unit="seconds", component="engine",
    help="Received to last token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:e2e_request_latency_seconds",),
)  # fmt: skip
REQUEST_QUEUE_TIME = HistogramDeclaration(
    name="quire_request_queue_time_seconds", unit="seconds", component="engine",
    help="Received to first scheduled.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_queue_time_seconds",),
)  # fmt: skip
REQUEST_PREFILL_TIME = HistogramDeclaration(
    name="quire_request_prefill_time_seconds", unit="seconds", component="engine",
    help="First scheduled to first token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_prefill_time_seconds",),
)  # fmt: skip
REQUEST_DECODE_TIME = HistogramDeclaration(
    name="quire_request_decode_time_seconds", unit="seconds", component="engine",
    help="First token to last token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_decode_time_seconds",),
)  # fmt: skip
REQUEST_INFERENCE_TIME = HistogramDeclaration(
    name="quire_request_inference_time_seconds", unit="seconds", component="engine",
    help="First scheduled to last token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_inference_time_seconds",),
)  # fmt: skip
REQUEST_PROMPT_TOKENS = HistogramDeclaration(
    name="quire_request_prompt_tokens", unit="tokens", component="engine",
    help="Prompt length of a request.", buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_prompt_tokens",),
)  # fmt: skip
REQUEST_COMPUTED_TOKENS = HistogramDeclaration(
    name="quire_request_computed_prompt_tokens", unit="tokens", component="engine",
    help="Prompt tokens of a request that were computed, not found in a cache.",
    buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_prefill_kv_computed_tokens",),
)  # fmt: skip
REQUEST_GENERATION_TOKENS = HistogramDeclaration(
    name="quire_request_generation_tokens", unit="tokens", component="engine",
    help="Tokens generated for a request, all choices together.", buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_generation_tokens",),
)  # fmt: skip
REQUEST_PARAMS_N = HistogramDeclaration(
    name="quire_request_params_n", unit="choices", component="engine",
    help="Choices that a request asked for.", buckets=CHOICE_BUCKETS,
    aliases=("vllm:request_params_n",),
)  # fmt: skip
REQUEST_PARAMS_MAX_TOKENS = HistogramDeclaration(
    name="quire_request_params_max_tokens", unit="tokens", component="engine",
    help="Output limit that a request asked for.", buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_params_max_tokens",),
)  # fmt: skip

# ---- Gateway

GATEWAY_REQUESTS = CounterDeclaration(
    name="quire_gateway_requests", unit="requests", component="gateway",
    help="Answered HTTP requests by route pattern and status code.",
    labels=("route", "code"),
)  # fmt: skip
GATEWAY_ERRORS = CounterDeclaration(
    name="quire_gateway_errors", unit="requests", component="gateway",
    help="Requests that ended in an error, by its code; errors inside a stream included.",
    labels=("code",),
)  # fmt: skip
GATEWAY_IN_FLIGHT = GaugeDeclaration(
    name="quire_gateway_requests_in_flight", unit="requests", component="gateway",
    help="Generation requests in progress.",
)  # fmt: skip
GATEWAY_OPEN_STREAMS = GaugeDeclaration(
    name="quire_gateway_open_streams", unit="streams", component="gateway",
    help="Open event streams.",
)  # fmt: skip
GATEWAY_TIME_TO_FIRST_TOKEN = HistogramDeclaration(
    name="quire_gateway_time_to_first_token_seconds", unit="seconds", component="gateway",
    help="Request received to first token at the gateway.", buckets=FIRST_TOKEN_BUCKETS,
)  # fmt: skip
GATEWAY_INTER_TOKEN_LATENCY = HistogramDeclaration(
    name="quire_gateway_inter_token_latency_seconds", unit="seconds", component="gateway",
    help="Time between two tokens of a choice at the gateway.", buckets=TOKEN_LATENCY_BUCKETS,
)  # fmt: skip
GATEWAY_REQUEST_DURATION = HistogramDeclaration(
    name="quire_gateway_request_duration_seconds", unit="seconds", component="gateway",
    help="Request received to last byte of the answer.", buckets=LATENCY_BUCKETS,
    labels=("route",),
)  # fmt: skip
GATEWAY_TOKENIZATION = HistogramDeclaration(
    name="quire_gateway_tokenization_seconds", unit="seconds", component="gateway",
    help="Rendering the chat template and tokenizing.", buckets=TOKENIZE_BUCKETS,
)  # fmt: skip
GATEWAY_INPUT_TOKENS = CounterDeclaration(
    name="quire_gateway_input_tokens", unit="tokens", component="gateway",
    help="Prompt tokens of accepted requests.",
)  # fmt: skip
GATEWAY_OUTPUT_TOKENS = CounterDeclaration(
    name="quire_gateway_output_tokens", unit="tokens", component="gateway",
    help="Tokens passed on to clients.",
)  # fmt: skip
GATEWAY_DISCONNECTS = CounterDeclaration(
    name="quire_gateway_disconnects", unit="requests", component="gateway",
    help="Requests whose client went away before the answer was complete.",
)  # fmt: skip
GATEWAY_RESUBMISSIONS = CounterDeclaration(
    name="quire_gateway_resubmissions", unit="requests", component="gateway",
    help="Requests sent again, behind the tokens they had, by why their worker could not go on.",
    labels=("reason",),
    values=((
        "lost", "silent", "hung", "draining", "not_ready", "overloaded", "internal", "gap",
        "aborted",
    ),),
)  # fmt: skip
GATEWAY_CHANGED_NUMERICS = CounterDeclaration(
    name="quire_gateway_changed_numerics", unit="requests", component="gateway",
    help="Requests that went on at a worker whose kernels round otherwise than those that their "
    "tokens came from.",
)  # fmt: skip
GATEWAY_PLACEMENTS = CounterDeclaration(
    name="quire_gateway_placements", unit="requests", component="gateway",
    help="Requests sent to a worker, by what chose it: a router, or the least load when none did.",
    labels=("by",), values=(("router", "least_load"),),
)  # fmt: skip
GATEWAY_ROUTE_FAILURES = CounterDeclaration(
    name="quire_gateway_route_failures", unit="questions", component="gateway",
    help="Questions to a router that brought no usable decision.",
    labels=("reason",), values=(("timeout", "unreachable", "no_pod", "unknown_pod"),),
)  # fmt: skip
GATEWAY_ROUTE_DURATION = HistogramDeclaration(
    name="quire_gateway_route_seconds", unit="seconds", component="gateway",
    help="Hashing a prompt and asking routers for it.", buckets=TOKENIZE_BUCKETS,
)  # fmt: skip
GATEWAY_ROUTERS_UP = GaugeDeclaration(
    name="quire_gateway_routers_up", unit="routers", component="gateway",
    help="Routers that answer and know a pod; the one in the gateway's own process always does.",
)  # fmt: skip
WORKER_UP = GaugeDeclaration(
    name="quire_gateway_worker_up", component="gateway",
    help="Workers that are ready to serve.",
)  # fmt: skip
WORKER_RESTARTS = CounterDeclaration(
    name="quire_gateway_worker_restarts", unit="restarts", component="gateway",
    help="Times the worker process was started again after it had died.",
)  # fmt: skip
# ---- Router

ROUTER_DECISIONS = CounterDeclaration(
    name="quire_router_decisions", unit="requests", component="router",
    help="Routed requests by where their prompt is prefilled.",
    labels=("prefill",), values=(("local", "remote"),),
)  # fmt: skip
ROUTER_REFUSALS = CounterDeclaration(
    name="quire_router_refusals", unit="requests", component="router",
    help="Requests for which no pod was ready.",
)  # fmt: skip
ROUTER_DECISION_DURATION = HistogramDeclaration(
    name="quire_router_decision_seconds", unit="seconds", component="router",
    help="Time of a decision.", buckets=DECISION_BUCKETS,
)  # fmt: skip
ROUTER_EXPECTED_TTFT = HistogramDeclaration(
    name="quire_router_expected_time_to_first_token_seconds", unit="seconds", component="router",
    help="Time to first token that decisions expected.", buckets=FIRST_TOKEN_BUCKETS,
)  # fmt: skip
ROUTER_PROMPT_TOKENS = CounterDeclaration(
    name="quire_router_prompt_tokens", unit="tokens", component="router",
    help="Prompt tokens of routed requests.",
)  # fmt: skip
ROUTER_EXPECTED_CACHED_TOKENS = CounterDeclaration(
    name="quire_router_expected_cached_tokens", unit="tokens", component="router",
    help="Prompt tokens expected to be cached where they are prefilled; observed requests only.",
)  # fmt: skip
ROUTER_ACTUAL_CACHED_TOKENS = CounterDeclaration(
    name="quire_router_actual_cached_tokens", unit="tokens", component="router",
    help="Prompt tokens that were cached where they were prefilled; observed requests only.",
)  # fmt: skip
ROUTER_PODS = GaugeDeclaration(
    name="quire_router_pods", unit="pods", component="router",
    help="Pods by state: taking requests, silent for too long, or known and not taking any.",
    labels=("state",), values=(("serving", "suspect", "away"),),
)  # fmt: skip
ROUTER_INDEX_BLOCKS = GaugeDeclaration(
    name="quire_router_index_blocks", unit="blocks", component="router",
    help="Different blocks in the prefix index.",
)  # fmt: skip
ROUTER_INDEX_BYTES = GaugeDeclaration(
    name="quire_router_index_bytes", unit="bytes", component="router",
    help="Memory of the prefix index.",
)  # fmt: skip
ROUTER_CACHE_EVENTS = CounterDeclaration(
    name="quire_router_cache_events", unit="events", component="router",
    help="Cache events taken in, those of snapshots included.",
)  # fmt: skip
ROUTER_RESYNCS = CounterDeclaration(
    name="quire_router_resyncs", unit="snapshots", component="router",
    help="Times a pod's cache was asked for again: events missing, another digest, or fewer "
    "cached tokens than expected.",
    labels=("reason",), values=(("gap", "digest", "drift"),),
)  # fmt: skip
BUILD_INFO = InfoDeclaration(
    name="quire_build_info", component="gateway",
    help="Version of Quire.",
    labels=("version", "python"),
)  # fmt: skip

DECLARATIONS: tuple[Declaration[Any], ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Declaration)
)


def engine_instruments(
    registry: CollectorRegistry, *, model_name: str, engine: str = "0"
) -> Instruments:
    """The engine's metrics, registered. `engine` numbers the replica, as in vLLM."""
    labels = {"model_name": model_name, "engine": engine}
    return Instruments("engine", DECLARATIONS, registry, labels)


def gateway_instruments(registry: CollectorRegistry) -> Instruments:
    """The gateway's metrics, registered."""
    return Instruments("gateway", DECLARATIONS, registry)


def router_instruments(registry: CollectorRegistry) -> Instruments:
    """The router's metrics, registered."""
    return Instruments("router", DECLARATIONS, registry)
