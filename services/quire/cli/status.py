"""`quire status`: the pods of a fleet and how they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.cli.fleet_client import OWNERS, ask
from quire.config.flags import Command

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.coordinator.client import CoordinatorClient
    from quire.proto import coordinator_pb2

COMMAND = Command(
    prog="quire status",
    summary="Show the pods of a fleet: where they are, how they stand, what they take.",
    owners=OWNERS,
    reads_environment=True,
)

_HEADER = ("POD", "STATE", "ROLE", "ADDRESS", "PID", "MEMORY", "START", "RESTARTS", "REASON")


def run(argv: Sequence[str]) -> int:
    """Ask the coordinator, print, return the exit code."""

    async def show(client: CoordinatorClient) -> None:
        print("\n".join(describe(await client.status())))

    return ask(COMMAND, argv, show)


def describe(status: coordinator_pb2.FleetStatus) -> Iterator[str]:
    """The lines to print."""
    yield f"fleet {status.fleet}, epoch {status.term}.{status.version}, coordinator {status.pid}"
    ray = status.ray_problem or "answers"
    yield f"ray {status.ray_address or 'not connected'}: {ray}"
    dashboard = status.dashboard_url or "off (it needs ray[default] and a head started with it)"
    yield f"ray dashboard: {dashboard}"
    for pool in status.pools:
        yield f"pool {pool.pool}: {pool.ready} of {pool.wanted} ready, model {pool.model}"
    rows = [_HEADER, *(_row(pod) for pod in status.pods)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def _row(pod: coordinator_pb2.PodStatus) -> tuple[str, ...]:
    started = "adopted" if pod.adopted else f"{pod.startup_s:.1f} s" if pod.startup_s else "-"
    return (
        pod.pod,
        pod.state,
        pod.role or "-",
        pod.address or "-",
        str(pod.pid or "-"),
        f"{pod.resident_bytes / 1e6:.0f} MB" if pod.resident_bytes else "-",
        started,
        str(pod.restarts),
        pod.reason,
    )
