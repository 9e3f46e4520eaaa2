"""Engines: steps, batches, blocks, start."""

from __future__ import annotations

from quire.telemetry import metrics as m
from quire.telemetry.grafana.common import HALF, S, latencies
from quire.telemetry.grafana.panels import Board, Panel, Query, Row


def engine() -> Board:
    """One engine, or several: steps, batches, blocks."""
    return Board(
        "quire-engine",
        "Quire / Engine",
        "Steps, batches and KV blocks of engines.",
        (
            Row("Steps", _steps()),
            Row("Memory", _memory()),
            Row("Requests", _requests()),
            Row("Facts", _facts()),
        ),
    )


def _steps() -> tuple[Panel, ...]:
    return (
        latencies("Step duration", m.STEP_DURATION),
        Panel(
            "Tokens per step",
            "short",
            (Query(S.mean(m.STEP_TOKENS), "mean"), Query(S.quantile(0.95, m.STEP_TOKENS), "p95")),
        ),
        Panel(
            "Time in steps",
            "percentunit",
            (Query(S.sum_rate(m.STEP_DURATION, "instance"), "{{instance}}"),),
            about="1 is an engine that is never idle.",
        ),
        Panel("Steps", "ops", (Query(S.rate(m.STEPS, "instance"), "{{instance}}"),)),
        Panel(
            "Age of the last step",
            "s",
            (Query(S.gauge("max", m.STEP_AGE, "instance"), "{{instance}}"),),
            about="Grows while an engine with work makes no progress.",
        ),
        Panel(
            "Batch",
            "short",
            (
                Query(S.gauge("sum", m.REQUESTS_RUNNING, "instance"), "{{instance}} running"),
                Query(S.gauge("sum", m.REQUESTS_WAITING, "instance"), "{{instance}} waiting"),
            ),
        ),
    )


def _memory() -> tuple[Panel, ...]:
    return (
        Panel(
            "KV blocks by state",
            "short",
            (Query(S.gauge("sum", m.KV_BLOCKS, "state"), "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            (Query(S.gauge("max", m.KV_CACHE_USAGE, "instance"), "{{instance}}"),),
        ),
        Panel(
            "Preemptions",
            "ops",
            (Query(S.rate(m.PREEMPTIONS, "instance"), "{{instance}}"),),
            about="Running requests sent back for want of blocks: their work is done again.",
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            (
                Query(
                    S.ratio(m.PREFIX_CACHE_HITS, m.PREFIX_CACHE_QUERIES, "instance"), "{{instance}}"
                ),
            ),
        ),
        Panel(
            "Prompt tokens waiting",
            "short",
            (Query(S.gauge("sum", m.QUEUED_TOKENS, "instance"), "{{instance}}"),),
        ),
        Panel(
            "Tokens",
            "count:tok/s",
            (
                Query(S.rate(m.PROMPT_TOKENS), "prompt"),
                Query(S.rate(m.GENERATION_TOKENS), "output"),
            ),
        ),
    )


def _requests() -> tuple[Panel, ...]:
    phases = (
        (m.REQUEST_QUEUE_TIME, "queue"),
        (m.REQUEST_PREFILL_TIME, "prefill"),
        (m.REQUEST_DECODE_TIME, "decode"),
    )
    return (
        Panel(
            "Where a request's time goes",
            "s",
            tuple(Query(S.mean(metric), name) for metric, name in phases),
            stacked=True,
            about="Mean per request and phase.",
        ),
        latencies("Time to first token, at the engine", m.TIME_TO_FIRST_TOKEN),
        latencies("Time per output token", m.TIME_PER_OUTPUT_TOKEN),
        Panel(
            "Finished by reason",
            "reqps",
            (Query(S.rate(m.REQUESTS_FINISHED, "finished_reason"), "{{finished_reason}}"),),
            stacked=True,
        ),
        Panel(
            "Length of prompts",
            "short",
            (
                Query(S.quantile(0.5, m.REQUEST_PROMPT_TOKENS), "p50"),
                Query(S.quantile(0.95, m.REQUEST_PROMPT_TOKENS), "p95"),
                Query(S.mean(m.REQUEST_COMPUTED_TOKENS), "computed, mean"),
            ),
        ),
        Panel(
            "Length of answers",
            "short",
            (
                Query(S.quantile(0.5, m.REQUEST_GENERATION_TOKENS), "p50"),
                Query(S.quantile(0.95, m.REQUEST_GENERATION_TOKENS), "p95"),
            ),
        ),
    )


def _facts() -> tuple[Panel, ...]:
    info = S.gauge("max", m.MODEL_INFO, "instance", "model", "architecture", "dtype", "device")
    cache = S.gauge("max", m.CACHE_CONFIG, "instance", "num_blocks", "block_size", "block_bytes")
    return (
        Panel("Models", "short", (Query(info),), "table", HALF),
        Panel("Caches", "short", (Query(cache),), "table", HALF),
    )


def start() -> Board:
    """How long pods take until they serve."""
    panels = (
        Panel(
            "Start by phase",
            "s",
            (Query(S.gauge("max", m.STARTUP_SECONDS, "phase"), "{{phase}}"),),
            stacked=True,
            width=HALF,
        ),
        Panel(
            "Start by pod",
            "s",
            (
                Query(
                    f"sum by (instance) ({S.gauge('max', m.STARTUP_SECONDS, 'instance', 'phase')})",
                    "{{instance}}",
                ),
            ),
            width=HALF,
        ),
    )
    return Board(
        "quire-start",
        "Quire / Cold start",
        "Where the time of a start goes.",
        (Row("Cold start", panels),),
    )
