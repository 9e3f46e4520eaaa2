"""How many pods does this trace need to keep this objective?

    quire bench step MODEL --output-json steps.json
    python -m loadtest.fleet TRACE.jsonl --steps steps.json --ttft 2 --itl 0.1 --loads 1 2 4

The router is the product's own; engines are models fitted to measured steps (without --steps: an
8 B model on one large GPU). Load grows by laying copies of the trace over each other, each with
prefixes of its own. For every load the smallest fleet of equal pods, and of prefill and decode
pods, out to a thousand pods. A simulation: it knows no failures, and its transfers take the time of
the last chunk.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.kept import keep
from quire.config.router import RouterConfig
from quire.router.simulation.fit import fit_engine
from quire.router.simulation.pod import EngineModel
from quire.router.simulation.replay import TRACE_BLOCK, FleetShape, TraceRequest, read_trace
from quire.router.simulation.sizing import Objective, Sizing, overlay

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Need:
    """What one load needs; None where the most pods allowed are not enough."""

    load: int
    requests: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    aggregated: int | None
    prefill: int | None
    decode: int | None
    attained: dict[str, float]
    """Fleet -> share of the requests within the objective, of every fleet tried."""
    replays: int
    took_s: float


def need(trace: Sequence[TraceRequest], load: int, options: argparse.Namespace) -> Need:
    """Search both kinds of fleet for the trace at one load."""
    started = time.perf_counter()
    model = engine_model(options)
    laid = overlay(trace, load, options.seed)
    objective = Objective(ttft_s=options.ttft, itl_s=options.itl, share=options.share)
    config = RouterConfig(routing_policy=options.policy, routing_seed=options.seed)
    sizing = Sizing(laid, config, model, objective)
    equal = sizing.aggregated(options.max_pods) if "aggregated" in options.kinds else None
    split = sizing.disaggregated(options.max_pods) if "disaggregated" in options.kinds else None
    span = max(r.arrival_s for r in laid) + 1e-9
    return Need(
        load=load,
        requests=len(laid),
        prompt_tokens_per_s=sum(r.prompt_len for r in laid) / span,
        output_tokens_per_s=sum(r.output_len for r in laid) / span,
        aggregated=equal.both if equal else None,
        prefill=split.prefill if split else None,
        decode=split.decode if split else None,
        attained={_name(shape): share for shape, share in sizing.tried.items()},
        replays=len(sizing.tried),
        took_s=time.perf_counter() - started,
    )


def engine_model(options: argparse.Namespace) -> EngineModel:
    """Fitted to measured steps, or the default. Raises ValueError."""
    if options.steps is None:
        return EngineModel()
    measured = json.loads(options.steps.read_text())
    return fit_engine(measured["steps"], measured["engine"], TRACE_BLOCK)


def table(needs: Sequence[Need]) -> str:
    """The needs as text."""
    lines = [
        f"{'load':>5}{'requests':>10}{'prompt tok/s':>14}{'output tok/s':>14}"
        f"{'equal pods':>12}{'prefill + decode':>18}{'replays':>9}{'took':>9}"
    ]
    for n in needs:
        split = "too many" if n.prefill is None else f"{n.prefill} + {n.decode}"
        equal = "too many" if n.aggregated is None else str(n.aggregated)
        lines.append(
            f"{n.load:>5}{n.requests:>10}{n.prompt_tokens_per_s:>14.0f}"
            f"{n.output_tokens_per_s:>14.0f}{equal:>12}{split:>18}{n.replays:>9}{n.took_s:>7.1f} s"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.fleet", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("trace", type=Path, help="Mooncake-format JSON lines")
    add("--steps", type=Path, help="from `quire bench step --output-json`")
    add("--ttft", type=float, default=2.0, help="seconds to the first token")
    add("--itl", type=float, default=0.1, help="seconds between tokens, a request's mean")
    add("--share", type=float, default=0.99, help="of the requests that keep both")
    add("--loads", type=int, nargs="+", default=[1, 2, 4], help="copies of the trace at once")
    add("--duration", type=float, help="seconds of the trace to use, from its start")
    add("--speed", type=float, default=1.0, help="of the trace's clock")
    add("--max-pods", type=int, default=1000)
    kinds = ["aggregated", "disaggregated"]
    add("--kinds", nargs="+", default=kinds, choices=kinds)
    add("--policy", default="cost")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="write OUT.json, OUT.txt and OUT.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Search each load, print and write."""
    options = parse(argv)
    trace = read_trace(options.trace, options.speed)
    if options.duration is not None:
        trace = [r for r in trace if r.arrival_s <= options.duration]
    needs = []
    for load in options.loads:
        needs.append(need(trace, load, options))
        print(table(needs[-1:]) if load == options.loads[0] else table(needs[-1:]).split("\n")[1])
    if options.out is not None:
        _write(needs, options)
    return 0


def _write(needs: Sequence[Need], options: argparse.Namespace) -> None:
    from loadtest.plots import plot_lines

    settings: dict[str, Any] = {
        k: v for k, v in vars(options).items() if k not in ("trace", "steps", "out")
    }
    settings |= {"trace": options.trace.name, "engine": asdict(engine_model(options))}
    keep(options.out, {"settings": settings, "needs": [asdict(n) for n in needs]}, table(needs))
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for n in needs:
        counts = {
            "equal pods": n.aggregated,
            "prefill pods": n.prefill,
            "decode pods": n.decode,
        }
        for name, count in counts.items():
            if count is not None:
                x, y = lines.setdefault(name, ([], []))
                x.append(n.prompt_tokens_per_s)
                y.append(count)
    plot_lines(lines, options.out.with_suffix(".png"), labels=("prompt tokens/s", "pods"))


def _name(shape: FleetShape) -> str:
    return str(shape.both) if shape.both else f"{shape.prefill}+{shape.decode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
