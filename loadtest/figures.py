"""What a run of a scenario says: figures of its steady window, under vLLM's names."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from quire.cli.bench.load import Load
from quire.cli.bench.report import count_within, parse_goodput, summarize

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loadtest.runner import Request, Run
    from loadtest.scenario import Scenario
    from quire.cli.bench.client import Outcome

BIN_S = 1.0


def window_figures(run: Run, scenario: Scenario) -> dict[str, Any]:
    """Figures of the requests due in the window, in all and per class.

    Latencies and goodput are of those requests. Token throughput is of the window's time: tokens
    that arrived in it, whichever request they belong to.
    """
    objectives = parse_goodput(scenario.goodput)
    begin, end = scenario.warm_up_s, scenario.warm_up_s + scenario.window_s
    counted = [r for r in run.requests if begin <= r.due < end]
    outcomes = [r.outcome for r in counted]
    load = Load(outcomes, scenario.window_s, _peak(outcomes))
    figures = summarize(load, objectives)
    arrived = _tokens_between(run, begin, end)
    figures["output_throughput"] = arrived / scenario.window_s
    figures["total_token_throughput"] = (
        figures["total_input_tokens"] + arrived
    ) / scenario.window_s
    within = count_within(outcomes, objectives)
    figures["goodput_share"] = within / len(outcomes) if objectives and outcomes else None
    return figures | {
        "goodput": list(scenario.goodput),
        "requests_sent": len(run.requests),
        "requests_counted": len(counted),
        "classes": {
            name: summarize(Load([r.outcome for r in group], scenario.window_s, 0), objectives)
            for name, group in _by_class(counted).items()
        },
        "errors": _errors(outcomes),
    }


def series(run: Run) -> dict[str, list[float]]:
    """Per second of the run: tokens that arrived, and requests in progress at its start."""
    spans = [(o.sent - run.began, _end(o) - run.began) for o in _sent(run.requests)]
    last = max((end for _, end in spans), default=0.0)
    bins = int(last / BIN_S) + 1
    return {
        "time_s": [i * BIN_S for i in range(bins)],
        "output_tokens_per_s": [
            _tokens_between(run, i * BIN_S, (i + 1) * BIN_S) / BIN_S for i in range(bins)
        ],
        "running": [
            float(sum(start <= i * BIN_S < end for start, end in spans)) for i in range(bins)
        ],
    }


def samples(run: Run, scenario: Scenario) -> dict[str, list[Any]]:
    """Each request of the run, for plots and for those who want other figures."""
    good = [r for r in run.requests if r.outcome.ok]
    begin, end = scenario.warm_up_s, scenario.warm_up_s + scenario.window_s
    return {
        "due_s": [r.due for r in good],
        "in_window": [begin <= r.due < end for r in good],
        "class": [r.request_class for r in good],
        "turn": [r.turn for r in good],
        "input_lens": [r.outcome.prompt_tokens for r in good],
        "output_lens": [r.outcome.output_tokens for r in good],
        "ttfts": [r.outcome.ttft for r in good],
        "e2els": [r.outcome.latency for r in good],
        "itls": [r.outcome.itls for r in good],
    }


def _tokens_between(run: Run, begin: float, end: float) -> float:
    """Output tokens that came then; an event of several tokens counts as so many."""
    total = 0.0
    for o in _sent(run.requests):
        if o.arrivals:
            here = sum(begin <= at - run.began < end for at in o.arrivals)
            total += here * (o.output_tokens or len(o.arrivals)) / len(o.arrivals)
    return total


def _sent(requests: Iterable[Request]) -> list[Outcome]:
    return [r.outcome for r in requests if r.outcome.sent]


def _end(outcome: Outcome) -> float:
    return outcome.arrivals[-1] if outcome.arrivals else outcome.sent


def _peak(outcomes: Sequence[Outcome]) -> int:
    """Most requests in progress at once."""
    sent = [o for o in outcomes if o.sent]
    changes = sorted(chain(((_end(o), -1) for o in sent), ((o.sent, 1) for o in sent)))
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak


def _by_class(requests: Iterable[Request]) -> dict[str, list[Request]]:
    groups: dict[str, list[Request]] = {}
    for r in requests:
        groups.setdefault(r.request_class, []).append(r)
    return groups


def _errors(outcomes: Iterable[Outcome]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for o in outcomes:
        if o.error:
            counts[o.error] = counts.get(o.error, 0) + 1
    return counts
