"""Feeds the router's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from quire.router.decisions import Decision
    from quire.router.fleet import Fleet
    from quire.telemetry.instruments import Instruments


class DecisionMetrics:
    """What was decided, and what came of it."""

    def __init__(self, instruments: Instruments) -> None:
        get = instruments.get
        self._local = get(m.ROUTER_DECISIONS, "local")
        self._remote = get(m.ROUTER_DECISIONS, "remote")
        self._refusals = get(m.ROUTER_REFUSALS)
        self._duration = get(m.ROUTER_DECISION_DURATION)
        self._ttft = get(m.ROUTER_EXPECTED_TTFT)
        self._prompt = get(m.ROUTER_PROMPT_TOKENS)
        self._expected = get(m.ROUTER_EXPECTED_CACHED_TOKENS)
        self._actual = get(m.ROUTER_ACTUAL_CACHED_TOKENS)

    def decided(self, decision: Decision, prompt_len: int, duration_s: float) -> None:
        """A request was routed."""
        (self._local if decision.prefill_pod is None else self._remote).inc()
        self._duration.observe(duration_s)
        self._ttft.observe(decision.expected_ttft_s)
        self._prompt.inc(prompt_len)

    def refused(self) -> None:
        """No pod was ready."""
        self._refusals.inc()

    def observed(self, expected_cached: int, actual_cached: int) -> None:
        """A routed request met its cache."""
        self._expected.inc(expected_cached)
        self._actual.inc(actual_cached)


def set_fleet_gauges(instruments: Instruments, fleet: Fleet, now: float) -> None:
    """Pods and index as they are. When scraped."""
    for state, count in fleet.states(now).items():
        instruments.get(m.ROUTER_PODS, state).set(count)
    instruments.get(m.ROUTER_INDEX_BLOCKS).set(len(fleet.index))
    instruments.get(m.ROUTER_INDEX_BYTES).set(fleet.index.nbytes)
