"""Tokens between tokens: do running streams stall while long prompts arrive?

    python -m loadtest.itl_under_prefill MODEL --prompt-lens 512 2048 8192

Two servers on this machine, one with equal workers and one with prefill beside decode workers, the
same number of processes and cores. Some streams run all the time; long prompts arrive on an open
loop, and the gaps of the running streams are measured while they do. Beside P50 and P99 ITL: the
prompts' TTFT, of which `loadtest.exposed_transfer` tells the parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.kept import keep, settings_of
from loadtest.servers import QuireServer
from quire.cli.bench.client import Client, Endpoint
from quire.cli.bench.load import LoadRun
from quire.cli.bench.report import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.cli.bench.client import Outcome

PATH = "/v1/completions"


async def measure(server: QuireServer, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One round: streams that run, prompts of `length` that arrive beside them."""
    rng = random.Random(f"{options.seed}/{length}/{time.monotonic_ns()}")
    ids = range(10, options.vocab_size)
    streams = [_body(rng.choices(ids, k=32), options.stream_tokens) for _ in range(options.streams)]
    arriving = [_body(rng.choices(ids, k=length), 2) for _ in range(options.prompts)]
    times = [options.settle_s + i / options.rate for i in range(options.prompts)]
    async with Client(Endpoint(server.url), 300) as client:
        background = asyncio.create_task(LoadRun(client, PATH).run(streams, [0.0] * len(streams)))
        began = time.perf_counter()
        load = await LoadRun(client, PATH).run(arriving, times)
        ended = time.perf_counter()
        running = (await background).outcomes
    failed = [o.error for o in (*load.outcomes, *running) if not o.ok]
    if failed:
        raise RuntimeError(f"{server.name}: {failed[0]}")
    window = (began + options.settle_s, ended)
    gaps = sorted(chain.from_iterable(_gaps(o, window) for o in running))
    ttfts = sorted(o.ttft for o in load.outcomes)
    return {
        "itl_p50_ms": 1e3 * percentile(gaps, 50),
        "itl_p99_ms": 1e3 * percentile(gaps, 99),
        "gaps": len(gaps),
        "ttft_p50_ms": 1e3 * percentile(ttfts, 50),
        "ttft_p99_ms": 1e3 * percentile(ttfts, 99),
    }


async def rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both shapes in turn for every length."""
    total = options.workers
    flags = ["--max-model-len", str(options.max_model_len)]
    split = ("--prefill", str(options.prefill), "--decode", str(total - options.prefill))
    shapes = {"aggregated": ("--replicas", str(total)), "P/D": split}
    servers: list[QuireServer] = []
    rows = []
    try:
        for name, shape in shapes.items():
            servers.append(QuireServer(name, options.model, [*flags, *shape]))
            servers[-1].wait_ready()
            servers[-1].group.freeze()
        for length in options.prompt_lens:
            each: dict[str, list[dict[str, Any]]] = {s.name: [] for s in servers}
            for number in range(options.repeats + 1):
                for server in servers if number % 2 else servers[::-1]:
                    server.group.thaw()
                    result = await measure(server, length, options)
                    server.group.freeze()
                    if number:  # the first round warms up
                        each[server.name].append(result)
            rows.append({"prompt_len": length, "rounds": each, **_medians(each)})
            print(table(rows[-1]), flush=True)
    finally:
        for server in servers:
            server.close()
    return rows


def table(row: dict[str, Any]) -> str:
    """One prompt length, both shapes."""
    lines = [f"prompts of {row['prompt_len']} tokens"]
    for name, m in row["medians"].items():
        lines.append(
            f"  {name:<11} ITL p50 {m['itl_p50_ms']:8.2f} ms, p99 {m['itl_p99_ms']:8.2f} ms; "
            f"TTFT p50 {m['ttft_p50_ms']:8.1f} ms"
        )
    aggregated, split = row["medians"].values()
    ratio = aggregated["itl_p99_ms"] / max(split["itl_p99_ms"], 1e-9)
    lines.append(f"  P99 ITL aggregated over P/D: {ratio:.2f}x")
    return "\n".join(lines)


def _medians(each: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "medians": {
            name: {
                figure: percentile(sorted(r[figure] for r in results), 50) for figure in results[0]
            }
            for name, results in each.items()
        }
    }


def _gaps(outcome: Outcome, window: tuple[float, float]) -> list[float]:
    """Gaps of a stream that end within the window."""
    pairs = zip(outcome.arrivals, outcome.arrivals[1:], strict=False)
    return [b - a for a, b in pairs if window[0] <= b <= window[1]]


def _body(prompt: Sequence[int], count: int) -> bytes:
    fields = {
        "prompt": prompt, "max_tokens": count, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(fields).encode()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.itl_under_prefill", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("model", nargs="?", default="demo")
    add("--prompt-lens", type=int, nargs="+", default=[512, 2048, 8000])
    add("--workers", type=int, default=2, help="processes of either server")
    add("--prefill", type=int, default=1, help="of them, on the split one")
    add("--streams", type=int, default=4, help="that run all the time")
    add("--stream-tokens", type=int, default=400)
    add("--prompts", type=int, default=6, help="long ones, in each round")
    add("--rate", type=float, default=2.0, help="long prompts per second")
    add("--settle-s", type=float, default=0.5, help="before the first long prompt")
    add("--repeats", type=int, default=5)
    add("--max-model-len", type=int, default=8192)
    add("--vocab-size", type=int, default=5000)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="write OUT.json and OUT.txt")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measure, print, write."""
    options = parse(argv)
    rows = asyncio.run(rounds(options))
    data = {"settings": settings_of(options), "rows": rows}
    keep(options.out, data, "\n".join(map(table, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
