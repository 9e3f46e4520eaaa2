"""Pictures of results. matplotlib comes with the `loadtest` extra."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SIZE = (10, 7)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. Raises ImportError where it is not installed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot_run(result: Mapping[str, Any], path: Path) -> None:
    """One run: latencies as distributions, throughput and TTFT over time."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=SIZE)
    each, over = result["samples"], result["series"]
    inside = [i for i, counted in enumerate(each["in_window"]) if counted]
    _distribution(axes[0][0], [1e3 * each["ttfts"][i] for i in inside], "TTFT, ms")
    itls = [1e3 * s for s in chain.from_iterable(each["itls"][i] for i in inside)]
    _distribution(axes[0][1], itls, "ITL, ms")
    axes[1][0].plot(over["time_s"], over["output_tokens_per_s"], label="output tokens/s")
    axes[1][0].plot(over["time_s"], over["running"], label="requests in progress")
    axes[1][0].set_xlabel("s")
    axes[1][0].legend()
    for name in dict.fromkeys(each["class"]):
        rows = [i for i, c in enumerate(each["class"]) if c == name]
        x, y = [each["due_s"][i] for i in rows], [1e3 * each["ttfts"][i] for i in rows]
        axes[1][1].plot(x, y, ".", label=name)
    axes[1][1].set_xlabel("s")
    axes[1][1].set_ylabel("TTFT, ms")
    axes[1][1].legend()
    for ax in axes[1]:
        begin = result["warm_up_s"]
        ax.axvspan(begin, begin + result["window_s"], alpha=0.1)
    figure.suptitle(f"{result['scenario']}: {result['label'] or result['model_id']}")
    _save(figure, path)


def plot_rates(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Several rates of one scenario: goodput and throughput, median and 99th percentile."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(SIZE[0] * 1.3, SIZE[1] / 2))
    rates = [r["request_rate"] for r in results]
    axes[0].plot(rates, [r["request_throughput"] for r in results], "o-", label="answered")
    if results[0]["request_goodput"] is not None:
        axes[0].plot(rates, [r["request_goodput"] for r in results], "o-", label="goodput")
    axes[0].set_ylabel("requests/s")
    for ax, name in ((axes[1], "ttft"), (axes[2], "itl")):
        for p in (50, 99):
            ax.plot(rates, [r[f"p{p}_{name}_ms"] for r in results], "o-", label=f"p{p}")
        ax.set_ylabel(f"{name.upper()}, ms")
    for ax in axes:
        ax.set_xlabel("sessions/s asked for")
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.suptitle(results[0]["scenario"])
    _save(figure, path)


def plot_ratios(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Bars of ratios: rows of label, ratio, low, high."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(SIZE[0], 0.35 * len(rows) + 1.5))
    places = list(range(len(rows)))[::-1]
    values = [row["ratio"] for row in rows]
    spread = [
        [max(row["ratio"] - row["low"], 0) for row in rows],
        [max(row["high"] - row["ratio"], 0) for row in rows],
    ]
    ax.barh(places, values, xerr=spread, height=0.6)
    ax.set_yticks(places, [row["label"] for row in rows])
    ax.axvline(1.0, color="black", linewidth=1)
    ax.set_xlabel("ratio")
    ax.set_title(title)
    _save(figure, path)


def plot_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    *,
    labels: tuple[str, str],
) -> None:
    """Named lines of (x, y) over two labelled axes."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=SIZE)
    for name, (x, y) in lines.items():
        ax.plot(x, y, "o-", label=name)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.set_ylim(bottom=0)
    ax.legend()
    _save(figure, path)


def _distribution(ax: Any, values: Sequence[float], label: str) -> None:
    """Share of the values at or below."""
    ordered = sorted(values)
    ax.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")
    ax.set_xlabel(label)
    ax.set_ylabel("share")
    ax.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
