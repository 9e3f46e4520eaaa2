"""Alerts: what a person should look at, each with a runbook in docs/runbooks.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.telemetry import metrics as m
from quire.telemetry.grafana.queries import Source

RUNBOOKS = "docs/runbooks.md"
EVERYTHING = Source(scope=(), model=None, window="5m")
SLOW_FIRST_TOKEN_S = 5


@dataclass(frozen=True)
class Alert:
    """A condition that has held for some time."""

    name: str
    expr: str
    lasts: str
    severity: str
    summary: str
    about: str

    @property
    def rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.about,
                "runbook_url": f"{RUNBOOKS}#{self.name.lower()}",
            },
        }


def alerts() -> tuple[Alert, ...]:
    """All of them, the gravest first."""
    return (*_critical(EVERYTHING), *_warnings(EVERYTHING))


def _critical(s: Source) -> tuple[Alert, ...]:
    failed = s.rate(m.GATEWAY_REQUESTS, "job", code="5..")
    return (
        Alert(
            "QuireNoWorkerReady",
            s.gauge("max", m.WORKER_UP, "job") + " == 0",
            "2m",
            "critical",
            "No worker is ready behind {{ $labels.job }}",
            "Requests are refused with 503. Workers are starting, failing, or cannot be reached.",
        ),
        Alert(
            "QuireEngineStalled",
            s.gauge("max", m.STEP_AGE, "job", "instance") + " > 30",
            "1m",
            "critical",
            "{{ $labels.instance }} has finished no step for {{ $value | humanizeDuration }}",
            "It has work and makes no progress. Its requests go on elsewhere; it ends itself after "
            "--stall-timeout-s.",
        ),
        Alert(
            "QuireErrorsHigh",
            f"{failed} / ({s.rate(m.GATEWAY_REQUESTS, 'job')} > 0) > 0.02",
            "5m",
            "critical",
            "{{ $value | humanizePercentage }} of requests fail",
            "Answers with a status of 500 or more.",
        ),
    )


def _warnings(s: Source) -> tuple[Alert, ...]:
    return (
        Alert(
            "QuireFirstTokenSlow",
            f"{s.quantile(0.95, m.GATEWAY_TIME_TO_FIRST_TOKEN, 'job')} > {SLOW_FIRST_TOKEN_S}",
            "10m",
            "warning",
            "p95 of the time to first token is {{ $value | humanizeDuration }}",
            "Prompts wait for prefill capacity, or are longer than they were.",
        ),
        Alert(
            "QuireQueueGrowing",
            s.gauge("sum", m.REQUESTS_WAITING, "job", "model_name") + " > 100",
            "5m",
            "warning",
            "{{ $value }} requests wait for {{ $labels.model_name }}",
            "More come than the engines can take.",
        ),
        Alert(
            "QuireKvCacheFull",
            s.gauge("min", m.KV_CACHE_USAGE, "job", "model_name") + " > 0.95",
            "10m",
            "warning",
            "The KV caches of {{ $labels.model_name }} are full",
            "Every engine's is: requests wait for blocks, and running ones are preempted.",
        ),
        Alert(
            "QuirePreempting",
            s.rate(m.PREEMPTIONS, "job", "instance") + " > 0.5",
            "10m",
            "warning",
            "{{ $labels.instance }} preempts {{ $value | humanize }} requests per second",
            "Their work is done again. Fewer sequences at once, or a larger cache, would help.",
        ),
        Alert(
            "QuireRequestsMoved",
            s.rate(m.GATEWAY_RESUBMISSIONS, "job", reason="lost|silent|hung") + " > 0.1",
            "5m",
            "warning",
            "Requests keep losing their workers",
            "Clients see nothing of it, but workers die, hang or cannot be reached.",
        ),
        Alert(
            "QuirePodSuspect",
            s.gauge("max", m.ROUTER_PODS, "job", state="suspect") + " > 0",
            "5m",
            "warning",
            "{{ $value }} pods are silent to the router",
            "They are asked last, and their caches count as unknown.",
        ),
        Alert(
            "QuireRoutingBlind",
            f"{s.rate(m.ROUTER_ACTUAL_CACHED_TOKENS, 'job')} < 0.5 * "
            f"({s.rate(m.ROUTER_EXPECTED_CACHED_TOKENS, 'job')} > 10)",
            "15m",
            "warning",
            "Less than half of the cached tokens that the router expects are there",
            "Its picture of the caches is wrong, or pods evict what they said they had.",
        ),
    )


def rules() -> dict[str, Any]:
    """The rules file."""
    return {"groups": [{"name": "quire", "rules": [alert.rule for alert in alerts()]}]}
