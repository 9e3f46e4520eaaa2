"""What a load run says: vLLM's names in JSON, the same figures as a table for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from quire.config.values import ConfigError, parse_float

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from quire.cli.bench.client import Outcome
    from quire.cli.bench.load import Load

PERCENTILES = (50, 90, 95, 99)
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
WIDTH = 56
LATE_S = 0.05
"""A client that starts requests this late, at the 99th percentile, measures itself."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of ordered values; 0 when there are none."""
    if not ordered:
        return 0.0
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def describe(name: str, seconds: Iterable[float]) -> dict[str, float]:
    """mean, median, deviation and percentiles in ms, under vLLM's names."""
    values = sorted(1e3 * s for s in seconds)
    figures = {
        f"mean_{name}_ms": fmean(values) if values else 0.0,
        f"median_{name}_ms": percentile(values, 50),
        f"std_{name}_ms": pstdev(values) if values else 0.0,
    }
    return figures | {f"p{p}_{name}_ms": percentile(values, p) for p in PERCENTILES}


@dataclass(frozen=True)
class Objective:
    """A latency that a request must stay within to count as goodput."""

    metric: str
    limit_s: float

    def met(self, outcome: Outcome) -> bool:
        """This request stayed within it; one without a value for the metric did."""
        value = {
            "ttft": outcome.ttft,
            "tpot": outcome.tpot,
            "itl": percentile(sorted(outcome.itls), 99),
            "e2el": outcome.latency,
        }[self.metric]
        return value is None or value <= self.limit_s


def parse_goodput(texts: Sequence[str]) -> list[Objective]:
    """`ttft:500` and the like, in ms. Raises ConfigError."""
    objectives = []
    for text in texts:
        metric, _, limit = text.partition(":")
        if metric not in METRICS:
            known = ", ".join(METRICS)
            raise ConfigError(f"goodput {text!r}: one of {known} is needed before the colon")
        try:
            objectives.append(Objective(metric, parse_float(limit) / 1e3))
        except ValueError as error:
            raise ConfigError(f"goodput {text!r}: {error}") from None
    return objectives


def count_within(outcomes: Iterable[Outcome], objectives: Sequence[Objective]) -> int:
    """Answered requests that met every objective."""
    return sum(o.ok and all(objective.met(o) for objective in objectives) for o in outcomes)


def summarize(load: Load, objectives: Sequence[Objective]) -> dict[str, Any]:
    """All figures of a run, under vLLM's names."""
    good = [o for o in load.outcomes if o.ok]
    duration = load.duration_s
    tokens_in = sum(o.prompt_tokens for o in good)
    tokens_out = sum(o.output_tokens for o in good)
    within = count_within(good, objectives)
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(load.outcomes) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / duration,
        "request_goodput": within / duration if objectives else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_concurrent_requests": load.peak_concurrency,
        "p99_start_delay_ms": 1e3 * percentile(sorted(o.late for o in load.outcomes), 99),
    }
    tpots = [o.tpot for o in good if o.tpot is not None]
    return figures | (
        describe("ttft", (o.ttft for o in good))
        | describe("tpot", tpots)
        | describe("itl", chain.from_iterable(o.itls for o in good))
        | describe("e2el", (o.latency for o in good))
    )


def details(load: Load) -> dict[str, list[Any]]:
    """Figures of each request, in the order sent, under vLLM's names."""
    return {
        "input_lens": [o.prompt_tokens for o in load.outcomes],
        "output_lens": [o.output_tokens for o in load.outcomes],
        "ttfts": [o.ttft if o.arrivals else None for o in load.outcomes],
        "itls": [o.itls for o in load.outcomes],
        "errors": [o.error for o in load.outcomes],
    }


def table(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    return "\n".join(_table(result))


def _table(result: dict[str, Any]) -> Iterator[str]:
    yield f"{' Serving Benchmark Result ':=^{WIDTH}}"
    rows = [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
        ("Maximum request concurrency:", result.get("max_concurrency")),
        ("Request rate configured (RPS):", result.get("request_rate")),
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
        ("Request goodput (req/s):", result["request_goodput"]),
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
        ("Peak concurrent requests:", result["max_concurrent_requests"]),
    ]
    for title, value in rows:
        if value is not None:
            yield _row(title, value)
    for name, heading in METRICS.items():
        yield f"{heading:-^{WIDTH}}"
        short = name.upper()
        yield _row(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        for p in PERCENTILES:
            yield _row(f"P{p} {short} (ms):", result[f"p{p}_{name}_ms"])
    yield "=" * WIDTH
    delay = result["p99_start_delay_ms"]
    if delay > 1e3 * LATE_S and result.get("max_concurrency") is None:
        yield f"The client started requests up to {delay:.0f} ms late (p99): it is the bottleneck."


def _row(title: str, value: object) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{title:<40}{shown:>{WIDTH - 40}}"
