"""`quire doctor [ADDRESS...]`: what is wrong here, and between workers. Says what to change.

    without addresses   this machine
    with addresses      this machine, each worker, and the speed of every pair over each transport

Exit code 1 when anything fails; warnings are no failure.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from quire.cli.table import table
from quire.cli.workers import WorkersConfig
from quire.config.base import check_fields
from quire.config.cluster import ClusterConfig
from quire.config.flags import Command, parse
from quire.config.option import option

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.cli.checks import Check
    from quire.cli.pairs import Pair

FAILED = 1
MAX_PROBE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """How it is shown."""

    json: bool = option(False, "output")
    """Print one JSON object."""
    probe_bytes: int = option(64 << 20, "workers")
    """Bytes sent to measure one transport of one pair (suffixes K, M, G)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 << 20 <= self.probe_bytes <= MAX_PROBE_BYTES:
            raise ValueError(f"probe_bytes must be 1M to 256M, not {self.probe_bytes}")


COMMAND = Command(
    prog="quire doctor",
    summary="Check this machine and, by their gRPC addresses, workers and the links between them.",
    owners=(WorkersConfig, DoctorConfig, ClusterConfig),
    positional="address",
    reads_environment=True,
    epilog="Exit code 1 when something fails.",
)
_HEADER = ("FROM", "TO", "BY", "GB/s", "P50 ms", "P99 ms", "ms/1k tokens", "LAYOUT")


@dataclass
class Report:
    """Everything that was found."""

    machine: list[Check]
    workers: list[Check]
    pairs: list[Pair]

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        checks = [*self.machine, *self.workers]
        return not any(x.level == "fail" for x in checks) and not any(x.problem for x in self.pairs)


def run(argv: Sequence[str]) -> int:
    """Look, print, return the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    config = resolved.get(DoctorConfig)
    report = asyncio.run(
        examine(resolved.get(WorkersConfig), resolved.get(ClusterConfig), config.probe_bytes)
    )
    if config.json:
        print(json.dumps({"ok": report.ok, **asdict(report)}, indent=2))
    else:
        print("\n".join(describe(report)))
    return 0 if report.ok else FAILED


async def examine(workers: WorkersConfig, cluster: ClusterConfig, probe_bytes: int) -> Report:
    """Look at everything."""
    from quire.cli.checks import machine

    report = Report(await asyncio.to_thread(lambda: list(machine())), [], [])
    if workers.named:
        from quire.cli.pairs import look_at_all, measure_all
        from quire.cluster.rpc import Cluster

        reaching = Cluster(cluster)
        seen, report.workers = await look_at_all(reaching, workers.named)
        report.pairs = await measure_all(reaching, seen, probe_bytes)
    return report


def describe(report: Report) -> Iterator[str]:
    """The lines to print."""
    yield "this machine"
    yield from _lines(report.machine)
    if report.workers:
        yield "\nworkers"
        yield from _lines(report.workers)
    if report.pairs:
        yield ""
        yield from table([_HEADER, *map(_row, report.pairs)])
    warnings = sum(x.level == "warn" for x in [*report.machine, *report.workers])
    yield f"\n{'all is well' if report.ok else 'something fails'}, {warnings} warnings"


def _lines(checks: Sequence[Check]) -> Iterator[str]:
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        yield f"  {check.level:<4}  {check.name:<{width}}  {check.found}"
        if check.advice:
            yield f"        {'':<{width}}  -> {check.advice}"


def _row(pair: Pair) -> tuple[str, ...]:
    ends = (pair.source, pair.target, pair.transport or "-")
    layout = "same" if pair.same_layout else "differs"
    if pair.problem:
        return (*ends, "-", "-", "-", "-", f"{layout}: {pair.problem}")
    figures = (pair.latency_p50_ms, pair.latency_p99_ms, pair.ms_per_1k_tokens)
    return (*ends, f"{pair.gigabytes_per_s:.2f}", *(f"{x:.2f}" for x in figures), layout)
