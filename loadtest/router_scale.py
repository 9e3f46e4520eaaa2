"""Decision time and memory of the router with many pods and many blocks.

    python loadtest/router_scale.py --out loadtest/results/router_scale

Fills the prefix index, then times whole decisions (look-up, costs of all pods, choice, effects, the
record for Explain) and the intake of cache events. Prompts have 2,000 blocks (32,000 tokens): a
system prompt every pod holds, a document some pods hold, a conversation one pod holds, and a new
rest. Every number is of one run in one process; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from quire.config.router import RouterConfig
from quire.router.query import RouteQuery
from quire.router.reports import LoadReport, PodModel
from quire.router.router import Router

SYSTEM_BLOCKS, DOCUMENT_BLOCKS, DOCUMENTS, DOCUMENT_PODS = 100, 400, 1000, 20
PROMPT_BLOCKS = 2000


@dataclass(frozen=True)
class Row:
    """One size."""

    pods: int
    blocks: int
    """Different ones in the index."""
    held: int
    """Pairs of pod and block."""
    holder_sets: int
    index_mb: float
    process_mb: float
    decision_p50_us: float
    decision_p99_us: float
    decision_cpu_p50_us: float
    decision_cpu_p99_us: float
    """The thread's own CPU time: without waiting for others on a shared machine."""
    lookup_p50_us: float
    lookup_p99_us: float
    events_per_s: float
    """Stored and removed, one at a time."""
    snapshot_blocks_per_s: float
    lose_pod_ms: float


def hashes(rng: np.random.Generator, count: int) -> bytes:
    """Random block hashes, 16 bytes each."""
    return rng.bytes(16 * count)


def split(joined: bytes) -> list[bytes]:
    """One by one."""
    return [joined[i : i + 16] for i in range(0, len(joined), 16)]


class Fleet:
    """A router whose pods hold what the module's text says."""

    def __init__(self, pods: int, blocks: int) -> None:
        self.rng = np.random.default_rng(0)
        self.router = Router(RouterConfig(routing_seed=0))
        fleet, now = self.router.fleet, self.router.clock()
        fleet.index.reserve(blocks)
        self.system = hashes(self.rng, SYSTEM_BLOCKS)
        self.documents = [hashes(self.rng, DOCUMENT_BLOCKS) for _ in range(DOCUMENTS)]
        own = (blocks - SYSTEM_BLOCKS - DOCUMENTS * DOCUMENT_BLOCKS) // pods
        readers = self.rng.integers(0, pods, (DOCUMENTS, DOCUMENT_PODS))
        self.read_by: list[list[int]] = [[] for _ in range(pods)]
        for document, row in enumerate(readers):
            for pod in set(row.tolist()):
                self.read_by[pod].append(document)
        self.own: list[bytes] = []
        started = time.perf_counter()
        for i in range(pods):
            pod = fleet.connect(PodModel(pod=f"pod-{i}", num_blocks=own), now)
            load = LoadReport(
                running=int(self.rng.integers(0, 60)),
                prefilling_tokens=int(self.rng.integers(0, 20_000)),
                prefill_tokens_per_s=float(self.rng.uniform(8e3, 12e3)),
                itl_s=0.02,
                itl_slope_s=0.0002,
            )
            fleet.report(f"pod-{i}", load, now)
            mine = hashes(self.rng, own)
            self.own.append(mine[: 16 * 1000])
            held = self.system + b"".join(self.documents[d] for d in self.read_by[i]) + mine
            fleet.stored(pod, split(held))
        self.fill_s = time.perf_counter() - started

    def prompt(self) -> bytes:
        """Some pod's conversation about a document that it holds, and a new rest."""
        pod = int(self.rng.integers(len(self.own)))
        shared = self.system
        if self.read_by[pod]:
            shared += self.documents[self.read_by[pod][0]]
        known = shared + self.own[pod][: 16 * 500]
        return known + hashes(self.rng, PROMPT_BLOCKS - len(known) // 16)


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile, in microseconds."""
    p50, p99 = np.percentile(np.array(seconds) * 1e6, [50, 99])
    return float(p50), float(p99)


def keep_alive(fleet: Fleet) -> None:
    """Every pod has just been heard of."""
    now = fleet.router.clock()
    for pod in fleet.router.fleet.pods:
        fleet.router.fleet.hear(pod, now)


def measure(pods: int, blocks: int, decisions: int) -> Row:
    """Fill, then time."""
    fleet = Fleet(pods, blocks)
    router, index = fleet.router, fleet.router.fleet.index
    whole, cpu, lookup = [], [], []
    for i in range(decisions + 20):
        if i % 200 == 0:
            keep_alive(fleet)
        query = RouteQuery(hashes=fleet.prompt(), prompt_len=16 * PROMPT_BLOCKS + 5)
        started, cpu_started = time.perf_counter(), time.thread_time()
        router.route(query)
        cpu.append(time.thread_time() - cpu_started)
        routed = time.perf_counter()
        index.depths(query.keys, pods)
        whole.append(routed - started)
        lookup.append(time.perf_counter() - routed)
    decision_p50, decision_p99 = percentiles(whole[20:])
    cpu_p50, cpu_p99 = percentiles(cpu[20:])
    lookup_p50, lookup_p99 = percentiles(lookup[20:])
    fresh = split(hashes(fleet.rng, 20_000))
    started = time.perf_counter()
    for h in fresh:
        index.store(0, h)
    for h in fresh:
        index.remove(0, h)
    events_per_s = 2 * len(fresh) / (time.perf_counter() - started)
    row_blocks, row_held, sets = len(index), index.num_held, index.num_sets
    started = time.perf_counter()
    router.fleet.lose("pod-0")
    lose_ms = (time.perf_counter() - started) * 1e3
    return Row(
        pods=pods,
        blocks=row_blocks,
        held=row_held,
        holder_sets=sets,
        index_mb=index.nbytes / 1e6,
        process_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        decision_p50_us=decision_p50,
        decision_p99_us=decision_p99,
        decision_cpu_p50_us=cpu_p50,
        decision_cpu_p99_us=cpu_p99,
        lookup_p50_us=lookup_p50,
        lookup_p99_us=lookup_p99,
        events_per_s=events_per_s,
        snapshot_blocks_per_s=row_held / fleet.fill_s,
        lose_pod_ms=lose_ms,
    )


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'pods':>6}{'blocks':>12}{'held':>12}{'index':>9}{'process':>10}"
        f"{'decision p50':>14}{'p99':>10}{'its CPU p50':>13}{'p99':>9}"
        f"{'lookup p50':>12}{'p99':>9}{'events/s':>11}{'snapshot/s':>12}{'pod lost':>10}"
    ]
    lines += [
        f"{r.pods:>6}{r.blocks:>12,}{r.held:>12,}{r.index_mb:>6.0f} MB{r.process_mb:>7.0f} MB"
        f"{r.decision_p50_us:>11.0f} us{r.decision_p99_us:>7.0f} us"
        f"{r.decision_cpu_p50_us:>10.0f} us{r.decision_cpu_p99_us:>6.0f} us"
        f"{r.lookup_p50_us:>9.0f} us{r.lookup_p99_us:>6.0f} us{r.events_per_s:>11,.0f}"
        f"{r.snapshot_blocks_per_s:>12,.0f}{r.lose_pod_ms:>7.1f} ms"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pods", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--decisions", type=int, default=2_000)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.txt")
    return parser.parse_args()


def main() -> int:
    """All sizes, each in a fresh process so that memory is its own."""
    options = parse()
    rows = []
    for pods in options.pods:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            with os.fdopen(sender, "w") as out:
                json.dump(asdict(measure(pods, options.blocks, options.decisions)), out)
            os._exit(0)
        os.close(sender)
        with os.fdopen(receiver) as results:
            rows.append(Row(**json.load(results)))
        os.waitpid(child, 0)
        print(f"{pods} pods: done", file=sys.stderr)
    settings = {"blocks": options.blocks, "decisions": options.decisions}
    settings |= {"prompt_blocks": PROMPT_BLOCKS, "load_average": os.getloadavg()[0]}
    shown = " ".join(f"{k}={v}" for k, v in settings.items())
    text = f"python loadtest/router_scale.py: {shown}\n{table(rows)}"
    print(text)
    if options.out:
        data = {"settings": settings, "rows": [asdict(row) for row in rows]}
        options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        options.out.with_suffix(".txt").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
