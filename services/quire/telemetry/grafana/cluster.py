"""Prefill and decode pods, and the router between them."""

from __future__ import annotations

from quire.telemetry import metrics as m
from quire.telemetry.grafana.common import HALF, S
from quire.telemetry.grafana.panels import Board, Panel, Query, Row


def disaggregation() -> Board:
    """Prefill and decode pods beside each other."""
    return Board(
        "quire-disaggregation",
        "Quire / Prefill and decode",
        "What prefill and decode pods do, and what waits for which.",
        (Row("Work", _work()), Row("KV transfer", _transfer()), Row("Waiting", _waits())),
    )


def _work() -> tuple[Panel, ...]:
    by_source = S.rate(m.PROMPT_TOKENS_BY_SOURCE, "source")
    moved = S.rate(m.PROMPT_TOKENS_BY_SOURCE, source="external_kv_transfer", role="decode")
    all_decoded = S.rate(m.PROMPT_TOKENS, role="decode")
    return (
        Panel(
            "Prompt tokens by source",
            "count:tok/s",
            (Query(by_source, "{{source}}"),),
            width=HALF,
            stacked=True,
            about="external_kv_transfer: blocks pushed by a prefill pod.",
        ),
        Panel(
            "Share of prompts that came from prefill pods",
            "percentunit",
            (Query(f"{moved} / ({all_decoded} > 0)", "moved"),),
            width=HALF,
            about="Of the prompt tokens of decode pods.",
        ),
        Panel(
            "Prompt tokens by role",
            "count:tok/s",
            (Query(S.rate(m.PROMPT_TOKENS, "role"), "{{role}}"),),
        ),
        Panel(
            "Output tokens by role",
            "count:tok/s",
            (Query(S.rate(m.GENERATION_TOKENS, "role"), "{{role}}"),),
        ),
        Panel(
            "Time in steps by role",
            "percentunit",
            (
                Query(
                    f"avg by (role) ({S.sum_rate(m.STEP_DURATION, 'role', 'instance')})", "{{role}}"
                ),
            ),
            about="Prefill pods near 1 and decode pods far from it: more prefill pods are needed.",
        ),
    )


def _transfer() -> tuple[Panel, ...]:
    pair = "{{pod}} to {{peer}}, {{transport}}"
    sent = S.rate(m.KV_TRANSFER_BYTES, "pod", "peer", "transport", direction="sent")
    busy = S.rate(m.KV_TRANSFER_BUSY, "pod", "peer", "transport")
    exposed = S.rate(m.KV_TRANSFER_EXPOSED)
    ended = S.rate(m.KV_TRANSFERS, direction="sent", outcome="committed")
    return (
        Panel("KV blocks sent", "Bps", (Query(sent, pair),), about="By pair of pods."),
        Panel(
            "Speed while sending",
            "Bps",
            (Query(f"{sent} / ({busy} > 0)", pair),),
            about="Bytes over the time in which some were on their way.",
        ),
        Panel(
            "Exposed time per transfer",
            "s",
            (Query(f"{exposed} / ({ended} > 0)", "mean"),),
            about="What of a transfer the prefill did not hide.",
        ),
        Panel(
            "Transfers by outcome",
            "ops",
            (Query(S.rate(m.KV_TRANSFERS, "direction", "outcome"), "{{direction}}, {{outcome}}"),),
            stacked=True,
        ),
        Panel(
            "Fenced frames",
            "ops",
            (Query(S.rate(m.KV_FENCED_FRAMES), "frames"),),
            about="Thrown away unread: of transfers that are over, or of another process.",
        ),
        Panel(
            "Taken over from draining pods",
            "ops",
            (Query(S.rate(m.MIGRATED_SEQUENCES, "how"), "{{how}}"),),
            about="Sequences that went on elsewhere: with their blocks, or computed again.",
        ),
    )


def _waits() -> tuple[Panel, ...]:
    return (
        Panel(
            "Waiting by role",
            "short",
            (Query(S.gauge("sum", m.REQUESTS_WAITING, "role"), "{{role}}"),),
        ),
        Panel(
            "Running by role",
            "short",
            (Query(S.gauge("sum", m.REQUESTS_RUNNING, "role"), "{{role}}"),),
        ),
        Panel(
            "KV cache in use by role",
            "percentunit",
            (Query(S.gauge("max", m.KV_CACHE_USAGE, "role"), "{{role}}"),),
        ),
        Panel(
            "Time in the queue, p95 by role",
            "s",
            (Query(S.quantile(0.95, m.REQUEST_QUEUE_TIME, "role"), "{{role}}"),),
        ),
        Panel(
            "Token latency, p95 by role",
            "s",
            (Query(S.quantile(0.95, m.INTER_TOKEN_LATENCY, "role"), "{{role}}"),),
            about="Decode pods without prompts to compute keep it even.",
        ),
        Panel(
            "Where the time to the first token goes, decode pods",
            "s",
            (
                Query(S.mean(m.REQUEST_QUEUE_TIME, role="decode"), "queue"),
                Query(S.mean(m.REQUEST_PREFILL_TIME, role="decode"), "prefill and transfer"),
            ),
            stacked=True,
        ),
    )


def router() -> Board:
    """Decisions, and how true what they were based on was."""
    return Board(
        "quire-router",
        "Quire / Router",
        "Where requests go, and whether that was right.",
        (Row("Decisions", _decisions()), Row("Prefix index", _index())),
        model_variable=False,
    )


def _decisions() -> tuple[Panel, ...]:
    return (
        Panel(
            "Decisions",
            "reqps",
            (Query(S.rate(m.ROUTER_DECISIONS, "prefill"), "{{prefill}}"),),
            about="remote: the prompt is computed by another pod than the one that answers.",
        ),
        Panel(
            "Time of a decision",
            "s",
            tuple(
                Query(S.quantile(q, m.ROUTER_DECISION_DURATION), f"p{q * 100:g}")
                for q in (0.5, 0.99)
            ),
        ),
        Panel("Refused: no pod was ready", "reqps", (Query(S.rate(m.ROUTER_REFUSALS), "refused"),)),
        Panel(
            "Cached tokens, expected and actual",
            "percentunit",
            (
                Query(S.ratio(m.ROUTER_EXPECTED_CACHED_TOKENS, m.ROUTER_PROMPT_TOKENS), "expected"),
                Query(S.ratio(m.ROUTER_ACTUAL_CACHED_TOKENS, m.ROUTER_PROMPT_TOKENS), "actual"),
            ),
            about="Shares of all routed prompt tokens. Apart for long: the index is wrong.",
        ),
        Panel(
            "Time to first token, expected",
            "s",
            (Query(S.mean(m.ROUTER_EXPECTED_TTFT), "expected, mean"),),
        ),
        Panel(
            "Pods",
            "short",
            (Query(S.gauge("max", m.ROUTER_PODS, "state"), "{{state}}"),),
            stacked=True,
        ),
    )


def _index() -> tuple[Panel, ...]:
    return (
        Panel(
            "Blocks in the index",
            "short",
            (Query(S.gauge("max", m.ROUTER_INDEX_BLOCKS), "blocks"),),
        ),
        Panel(
            "Memory of the index", "bytes", (Query(S.gauge("max", m.ROUTER_INDEX_BYTES), "bytes"),)
        ),
        Panel("Cache events", "ops", (Query(S.rate(m.ROUTER_CACHE_EVENTS), "events"),)),
        Panel(
            "Caches asked for again",
            "ops",
            (Query(S.rate(m.ROUTER_RESYNCS, "reason"), "{{reason}}"),),
        ),
    )
