"""The gateway: HTTP requests, and the workers and routers that it knows."""

from __future__ import annotations

from quire.telemetry.instruments import (
    CounterDeclaration,
    GaugeDeclaration,
    HistogramDeclaration,
    InfoDeclaration,
)
from quire.telemetry.metrics.buckets import (
    FIRST_TOKEN_BUCKETS,
    LATENCY_BUCKETS,
    TOKEN_LATENCY_BUCKETS,
    TOKENIZE_BUCKETS,
)

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
BUILD_INFO = InfoDeclaration(
    name="quire_build_info", component="gateway",
    help="Version of Quire.",
    labels=("version", "python"),
)  # fmt: skip
