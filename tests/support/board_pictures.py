"""A dashboard as a picture, drawn from the answers to its own queries. Needs matplotlib."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quire.telemetry.grafana.panels import Board, Panel

COLUMNS = 3
FORMATS = {
    "s": lambda v: f"{v * 1000:.3g} ms" if abs(v) < 1 else f"{v:.3g} s",
    "percentunit": lambda v: f"{v * 100:.3g} %",
    "reqps": lambda v: f"{v:.3g} req/s",
    "ops": lambda v: f"{v:.3g} /s",
    "count:tok/s": lambda v: f"{v:.3g} tok/s",
    "Bps": lambda v: f"{v / 2**20:.3g} MiB/s",
    "bytes": lambda v: f"{v / 1024:.3g} KiB",
    "short": lambda v: f"{v:.3g}",
}


def draw(board: Board, ask: Callable[[str], list[dict]], path: Path) -> None:
    """Tiles above, graphs below; tables are left out."""
    panels = [panel for row in board.rows for panel in row.panels]
    tiles = [panel for panel in panels if panel.kind == "stat"]
    graphs = [panel for panel in panels if panel.kind == "timeseries"]
    rows, tile_rows = -(-len(graphs) // COLUMNS), -(-len(tiles) // 6)
    figure = plt.figure(figsize=(15, 2.6 * rows + 0.9 * tile_rows + 0.6), layout="constrained")
    figure.suptitle(board.title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    parts = figure.subfigures(
        2 if tiles else 1, 1, squeeze=False,
        height_ratios=[0.9 * tile_rows, 2.6 * rows] if tiles else None,
    )[:, 0]  # fmt: skip
    if tiles:
        for axis, panel in zip(parts[0].subplots(tile_rows, 6).flat, tiles, strict=False):
            _tile(axis, panel, ask)
    axes = list(parts[-1].subplots(rows, COLUMNS, squeeze=False).flat)
    for axis, panel in zip(axes, graphs, strict=False):
        _graph(axis, panel, ask)
    for axis in axes[len(graphs) :]:
        axis.axis("off")
    figure.savefig(path, dpi=70)
    plt.close(figure)


def _tile(axis, panel: Panel, ask) -> None:
    values = [float(v) for _, v in ask(panel.queries[0].expr)[0]["values"] if v != "NaN"]
    axis.set(xticks=[], yticks=[], facecolor="#eaf3ec")
    axis.text(0.5, 0.72, panel.title, ha="center", va="center", fontsize=8, color="#555555")
    shown = FORMATS[panel.unit](values[-1])
    axis.text(0.5, 0.32, shown, ha="center", va="center", fontsize=13)


def _graph(axis, panel: Panel, ask) -> None:
    drawn = [(query.legend, series) for query in panel.queries for series in ask(query.expr)]
    first = min((float(s["values"][0][0]) for _, s in drawn), default=0)
    lines = []
    for legend, series in drawn:
        points = [(float(t) - first, float(v)) for t, v in series["values"]]
        label = re.sub(
            r"\{\{(\w+)\}\}", lambda m, s=series: s["metric"].get(m.group(1), ""), legend
        )
        lines.append((label, points))
    if panel.stacked and lines:
        times = sorted({t for _, points in lines for t, _ in points})
        heights = [[dict(points).get(t, 0) for t in times] for _, points in lines]
        axis.stackplot(times, heights, labels=[label for label, _ in lines], alpha=0.7)
    else:
        for label, points in lines:
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.3)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: FORMATS[panel.unit](v)))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    axis.margins(x=0)
    axis.legend(fontsize=6, loc="upper right", ncols=2)
