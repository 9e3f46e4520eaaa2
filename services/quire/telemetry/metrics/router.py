"""The router: decisions, the pods it knows and its prefix index."""

from __future__ import annotations

from quire.telemetry.instruments import CounterDeclaration, GaugeDeclaration, HistogramDeclaration
from quire.telemetry.metrics.buckets import DECISION_BUCKETS, FIRST_TOKEN_BUCKETS

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
