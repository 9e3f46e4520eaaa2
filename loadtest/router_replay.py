"""Replays a trace against modelled pods with each routing policy, side by side.

    python loadtest/router_replay.py TRACE.jsonl --out loadtest/results/router_replay

Two scenarios: pods whose caches hold all of the trace between them several times over, and pods
whose caches together hold a small part of it. Prints, per policy, the cached-token hit rate, its
share of the infinite-cache ceiling, and times to first token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from quire.config.router import POLICY_NAMES, RouterConfig
from quire.router.simulation.pod import EngineModel
from quire.router.simulation.replay import (
    Replay,
    TraceRequest,
    infinite_cache_hit_rate,
    read_trace,
)

NEVER = 1 << 30


@dataclass(frozen=True)
class Row:
    """One policy in one scenario."""

    scenario: str
    policy: str
    cache_tokens: int
    """All pods together."""
    hit_rate: float
    of_ceiling: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    prediction_error: float
    decision_us: float


def measure(
    scenario: str, policy: str, trace: list[TraceRequest], options: argparse.Namespace
) -> Row:
    """Replay the trace once."""
    blocks = options.enough_blocks if scenario == "enough" else options.scarce_blocks
    model = EngineModel(cache_blocks=blocks, prefill_tokens_per_s=options.prefill_rate)
    config = RouterConfig(
        routing_policy=policy,
        routing_seed=options.seed,
        min_remote_prefill_tokens=NEVER,  # the modelled pods prefill what they decode
    )
    started = time.perf_counter()
    result = Replay(trace, config, model, options.pods).run()
    took = time.perf_counter() - started
    ttft = result.ttft_s()
    return Row(
        scenario=scenario,
        policy=policy,
        cache_tokens=blocks * model.block_size * options.pods,
        hit_rate=result.hit_rate,
        of_ceiling=result.hit_rate / infinite_cache_hit_rate(trace),
        ttft_mean_s=ttft["mean"],
        ttft_p50_s=ttft["p50"],
        ttft_p99_s=ttft["p99"],
        prediction_error=result.prediction_error,
        decision_us=took / len(trace) * 1e6,
    )


def table(rows: list[Row], ceiling: float) -> str:
    """The rows as text."""
    lines = [f"infinite-cache ceiling {ceiling:.3f}", ""]
    head = f"{'policy':<14}{'hit':>7}{'/ceiling':>10}{'TTFT mean':>11}{'p50':>8}{'p99':>9}"
    for scenario in dict.fromkeys(row.scenario for row in rows):
        share = [row for row in rows if row.scenario == scenario]
        tokens = share[0].cache_tokens / 1e6
        lines += [f"{scenario} cache: {tokens:.1f} M tokens on all pods together", head]
        lines += [
            f"{r.policy:<14}{r.hit_rate:>7.3f}{r.of_ceiling:>10.3f}{r.ttft_mean_s:>9.3f} s"
            f"{r.ttft_p50_s:>6.3f} s{r.ttft_p99_s:>7.2f} s"
            for r in share
        ] + [""]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path, help="Mooncake-format JSON lines")
    parser.add_argument("--pods", type=int, default=8)
    parser.add_argument("--speed", type=float, default=1.0, help="of the trace's clock")
    parser.add_argument("--prefill-rate", type=float, default=10_000.0, help="tokens/s of a pod")
    parser.add_argument("--enough-blocks", type=int, default=60_000, help="512 tokens, per pod")
    parser.add_argument("--scarce-blocks", type=int, default=2_000, help="512 tokens, per pod")
    parser.add_argument("--policies", nargs="+", default=POLICY_NAMES, choices=POLICY_NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.txt")
    return parser.parse_args()


def main() -> int:
    """Run all policies in both scenarios."""
    options = parse()
    trace = read_trace(options.trace, options.speed)
    ceiling = infinite_cache_hit_rate(trace)
    rows = []
    for scenario in ("enough", "scarce"):
        for policy in options.policies:
            rows.append(measure(scenario, policy, trace, options))
            print(f"{scenario} {policy}: done", file=sys.stderr)
    settings = {k: v for k, v in vars(options).items() if k not in ("trace", "out")}
    settings |= {"trace": options.trace.name, "requests": len(trace)}
    shown = " ".join(f"{k}={v}" for k, v in settings.items() if k != "policies")
    text = f"python loadtest/router_replay.py: {shown}\n{table(rows, ceiling)}"
    print(text)
    if options.out:
        data = {"settings": settings, "ceiling": ceiling, "rows": [asdict(row) for row in rows]}
        options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        options.out.with_suffix(".txt").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
