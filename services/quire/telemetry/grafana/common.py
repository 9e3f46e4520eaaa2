"""What the boards share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.telemetry.grafana.panels import Panel, Query
from quire.telemetry.grafana.queries import Source

if TYPE_CHECKING:
    from quire.telemetry.instruments import HistogramDeclaration

S = Source()
TILE = 4
HALF = 12


def latencies(title: str, metric: HistogramDeclaration, width: int = 8) -> Panel:
    """Median, tail and mean of a duration."""
    queries = [Query(S.quantile(q, metric), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]
    queries.append(Query(S.mean(metric), "mean"))
    return Panel(title, "s", tuple(queries), width=width, about=metric.help)


def tile(
    title: str, unit: str, expr: str, *, limits: tuple[float, float] | None = None, about: str = ""
) -> Panel:
    """One number."""
    return Panel(title, unit, (Query(expr),), "stat", TILE, about, limits)
