"""What an operator looks at first."""

from __future__ import annotations

from quire.telemetry import metrics as m
from quire.telemetry.grafana.common import S, latencies, tile
from quire.telemetry.grafana.panels import Board, Panel, Query, Row

FIRST_TOKEN_GOAL_S = 1.0
TOKEN_GOAL_S = 0.1


def overview() -> Board:
    """What an operator looks at first."""
    ttft, itl = m.GATEWAY_TIME_TO_FIRST_TOKEN, m.GATEWAY_INTER_TOKEN_LATENCY
    failed = f"({S.rate(m.GATEWAY_REQUESTS, code='5..')} or vector(0))"
    tiles = (
        tile("Requests", "reqps", S.rate(m.GATEWAY_REQUESTS)),
        tile("Output tokens", "count:tok/s", S.rate(m.GATEWAY_OUTPUT_TOKENS)),
        tile("Time to first token, p95", "s", S.quantile(0.95, ttft), limits=(1, 5)),
        tile("Token latency, p95", "s", S.quantile(0.95, itl), limits=(0.1, 0.5)),
        tile(
            "Failed requests",
            "percentunit",
            f"{failed} / ({S.rate(m.GATEWAY_REQUESTS)} > 0)",
            limits=(0.001, 0.01),
            about="Share answered with a status of 500 or more.",
        ),
        tile(
            "KV cache, fullest engine",
            "percentunit",
            S.gauge("max", m.KV_CACHE_USAGE),
            limits=(0.8, 0.95),
        ),
        tile("Waiting", "short", S.gauge("sum", m.REQUESTS_WAITING), limits=(10, 100)),
        tile("Running", "short", S.gauge("sum", m.REQUESTS_RUNNING)),
        tile(
            "Prefix cache hits", "percentunit", S.ratio(m.PREFIX_CACHE_HITS, m.PREFIX_CACHE_QUERIES)
        ),
        tile("Workers ready", "short", S.gauge("max", m.WORKER_UP), limits=(1, 0.5)),
        tile(
            f"First token within {FIRST_TOKEN_GOAL_S:g} s",
            "percentunit",
            S.share_within(FIRST_TOKEN_GOAL_S, ttft),
            limits=(0.99, 0.95),
        ),
        tile(
            f"Token within {TOKEN_GOAL_S * 1000:g} ms",
            "percentunit",
            S.share_within(TOKEN_GOAL_S, itl),
            limits=(0.99, 0.95),
        ),
    )
    latency = (
        latencies("Time to first token", ttft),
        latencies("Token latency", itl),
        latencies("Request duration", m.GATEWAY_REQUEST_DURATION),
    )
    return Board(
        "quire-overview",
        "Quire / Overview",
        "Latency, throughput, saturation and errors.",
        (
            Row("Now", tiles),
            Row("Latency", latency),
            Row("Load", _load()),
            Row("Errors and recovery", _errors()),
        ),
    )


def _load() -> tuple[Panel, ...]:
    return (
        Panel(
            "Tokens",
            "count:tok/s",
            (
                Query(S.rate(m.GATEWAY_INPUT_TOKENS), "prompt"),
                Query(S.rate(m.GATEWAY_OUTPUT_TOKENS), "output"),
            ),
        ),
        Panel(
            "Requests in progress",
            "short",
            (
                Query(S.gauge("sum", m.GATEWAY_IN_FLIGHT), "in flight"),
                Query(S.gauge("sum", m.REQUESTS_RUNNING), "running"),
                Query(S.gauge("sum", m.REQUESTS_WAITING), "waiting"),
                Query(S.gauge("sum", m.GATEWAY_OPEN_STREAMS), "open streams"),
            ),
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            (
                Query(S.gauge("max", m.KV_CACHE_USAGE), "fullest"),
                Query(S.gauge("avg", m.KV_CACHE_USAGE), "mean"),
            ),
        ),
    )


def _errors() -> tuple[Panel, ...]:
    return (
        Panel(
            "Answers by status",
            "reqps",
            (Query(S.rate(m.GATEWAY_REQUESTS, "code"), "{{code}}"),),
            stacked=True,
        ),
        Panel(
            "Requests moved to another worker",
            "ops",
            (Query(S.rate(m.GATEWAY_RESUBMISSIONS, "reason"), "{{reason}}"),),
            about="Clients see nothing of it: the answer goes on behind the tokens it had.",
        ),
        Panel(
            "Refused by engines",
            "reqps",
            (Query(S.rate(m.ADMISSION_REJECTIONS, "reason"), "{{reason}}"),),
        ),
        Panel("Clients that went away", "ops", (Query(S.rate(m.GATEWAY_DISCONNECTS), "clients"),)),
        Panel("Worker restarts", "ops", (Query(S.rate(m.WORKER_RESTARTS), "restarts"),)),
        latencies("Template and tokenizer", m.GATEWAY_TOKENIZATION),
    )
