"""`python -m loadtest.compare`: the same work on Quire and on peers in one go.

    python -m loadtest.compare --cache-dir ~/.cache/quire-compare --shapes S M L \
        --peers vllm --tests decode mix prefill http --out loadtest/results/compare
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.compare.environments import PEERS, PeerMissing, model_for, prepare, warnings_of
from loadtest.compare.http import SERVERS, HttpLoad, Server, http_measure
from loadtest.compare.process import EngineProcess
from loadtest.compare.rounds import Series, alternate, ratios
from loadtest.compare.workloads import SIZES, workloads
from loadtest.kept import keep
from loadtest.shapes import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

TESTS = ("decode", "mix", "prefill", "http")
OURS = "quire"
EQUALITY_OUTPUTS = 16


@dataclass
class Results:
    """Rows of the comparison, kept after every test so that a broken run leaves what it has."""

    settings: dict[str, Any]
    out: Path | None
    rows: list[dict[str, Any]]

    def add(self, shape: str, test: str, figures: dict[str, dict[str, Series]], ours: str) -> None:
        """Take in, print and write what one test gave."""
        for figure, by_name in figures.items():
            better = figure.endswith("throughput") or "tok/s" in figure
            row = {
                "shape": shape,
                "test": test,
                "figure": figure,
                "engines": {name: series.summary() for name, series in by_name.items()},
                "ratios": ratios(by_name, ours, higher_is_better=better),
            }
            self.rows.append(row)
            print(line(row), flush=True)
        self.write()

    def write(self) -> None:
        """OUT.json."""
        keep(self.out, {"settings": self.settings, "rows": self.rows})


def line(row: dict[str, Any]) -> str:
    """One figure: each engine's median (least to greatest), then ratios."""
    shown = [
        f"{name} {s['median']:.4g} ({s['min']:.4g} to {s['max']:.4g})"
        for name, s in row["engines"].items()
    ]
    beside = [
        f"{r['ratio']:.2f}x {r['peer']} ({r['low']:.2f} to {r['high']:.2f})" for r in row["ratios"]
    ]
    head = f"{row['shape']} {row['test']} {row['figure']}"
    return f"{head}: {'; '.join(shown)} | {', '.join(beside)}"


def offline(shape: str, options: argparse.Namespace, results: Results) -> None:
    """decode, mix and prefill through each engine's own `generate`."""
    wanted = workloads(shape, options.tests, options.batches)
    if not wanted:
        return
    model = build(shape, options.cache_dir / "models" / shape)

    def start(name: str) -> EngineProcess:
        own = model_for(PEERS[name], model, options.dtype, options.cache_dir)
        return EngineProcess(PEERS[name], own, options.dtype, options.cache_dir, options.threads)

    with _started([OURS, *options.peers], start) as engines:
        if options.check:
            _check_equal(engines, shape)
        for workload in wanted:

            def measure(engine: EngineProcess, number: int, w: Any = workload) -> dict[str, float]:
                return {"tok/s": w.measure(engine, number)}

            able = [e for e in engines if workload.name.split()[0] in e.peer.tests]
            figures = alternate(able, options.repeats, measure)
            results.add(shape, workload.name, figures, engines[0].name)


def online(shape: str, options: argparse.Namespace, results: Results) -> None:
    """The HTTP servers of those engines that have one, under the same loads."""
    model = build(shape, options.cache_dir / "models" / shape)
    names = [OURS, *(p for p in options.peers if p in SERVERS)]

    def start(name: str) -> Server:
        return Server(name, model, options.dtype, options.cache_dir, options.threads)

    loads = [HttpLoad(options.http_prompts, max_concurrency=c) for c in options.http_concurrency]
    loads += [HttpLoad(options.http_prompts, request_rate=r) for r in options.http_rate]
    with _started(names, start) as servers:
        for load in loads:
            figures = alternate(servers, options.repeats, http_measure(load, shape))
            results.add(shape, load.name, figures, OURS)


@contextmanager
def _started(names: Sequence[str], start: Callable[[str], Any]) -> Iterator[list[Any]]:
    """Those that can be had, one after the other, each frozen when it is ready; ended in the end.
    Ours must come up."""
    started: list[Any] = []
    with ExitStack() as ending:
        for name in names:
            try:
                process = start(name)
                ending.callback(process.close)
                process.wait_ready()
            except PeerMissing as error:
                if name == OURS:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                continue
            process.group.freeze()
            started.append(process)
        yield started


def _check_equal(engines: Sequence[EngineProcess], shape: str) -> None:
    """Print how many greedy tokens agree with ours: all in float32, most in bfloat16."""
    prompts = [[100 + 37 * i % 4000 for i in range(n)] for n in (20, 33, 64, 128)]
    tokens = {}
    for engine in engines:
        engine.group.thaw()
        asked = engine.ask(prompts, [EQUALITY_OUTPUTS] * len(prompts), tokens=True)
        tokens[engine.name] = asked.token_ids or []
        engine.group.freeze()
    ours = tokens[engines[0].name]
    for name, theirs in tokens.items():
        pairs = [
            (a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
        ]
        same = sum(a == b for a, b in pairs)
        print(f"{shape} greedy tokens equal to ours: {name} {same} of {len(pairs)}", flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.compare",
        description="The same work on Quire and on other engines, alternately measured.",
    )
    add = parser.add_argument
    add("--cache-dir", type=Path, required=True, help="environments, models, logs")
    add("--shapes", nargs="+", default=["S", "M", "L"], choices=list(SIZES))
    add("--peers", nargs="*", default=["vllm"], choices=[p for p in PEERS if p != OURS])
    add("--tests", nargs="+", default=["decode", "mix", "prefill"], choices=TESTS)
    add("--batches", nargs="+", type=int, default=[1, 8, 32], help="of the decode test")
    add("--repeats", type=int, default=5, help="rounds that count")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--http-concurrency", nargs="*", type=int, default=[1, 8])
    add("--http-rate", nargs="*", type=float, default=[], help="requests per second, open loop")
    add("--http-prompts", type=int, default=24, help="requests in each run")
    add("--check", action="store_true", help="also compare greedy tokens")
    add("--prepare-only", action="store_true", help="make environments and models, and stop")
    add("--out", type=Path, help="write OUT.json and OUT.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Prepare, measure, print, write."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, _end)  # the engines have process groups of their own
    usable = []
    for name in options.peers:
        try:
            prepare(PEERS[name], options.cache_dir)
        except PeerMissing as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        usable.append(name)
        for warning in warnings_of(PEERS[name]):
            print(f"warning: {warning}", file=sys.stderr)
    options.peers = usable
    if options.prepare_only:
        for shape in options.shapes:
            print(build(shape, options.cache_dir / "models" / shape))
        return 0
    settings = {k: v for k, v in vars(options).items() if k not in ("cache_dir", "out")}
    settings |= {"machine": platform.processor() or platform.machine(), "began": time.ctime()}
    settings["load_average"] = os.getloadavg()[0]
    results = Results(settings, options.out, [])
    for shape in options.shapes:
        offline(shape, options, results)
        if "http" in options.tests:
            online(shape, options, results)
    if options.out is not None and results.rows:
        _plot(results, options.out)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _plot(results: Results, out: Path) -> None:
    from loadtest.plots import plot_ratios

    rows = [
        {"label": f"{row['shape']} {row['test']} {row['figure']} / {r['peer']}", **r}
        for row in results.rows
        for r in row["ratios"]
    ]
    plot_ratios(rows, out.with_suffix(".png"), title="Quire beside others (above 1: better)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
