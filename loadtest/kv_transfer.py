"""KV blocks between two processes: each transport beside a bare socket loop, in one run.

    python loadtest/kv_transfer.py --rounds 5 --gib 2

Every round runs every variant once, in fresh processes, so that what else the machine does falls
on all of them alike; the median is printed, as throughput, as a ratio to the socket loop's, and as
CPU seconds per GB of each side. "socket" is `sendall` of a block and `recv_into` the pool, without
checksums or anything else; "socket+xxh3" adds the checksum on both sides. The transports verify a
checksum of every block, grant windows of blocks and acknowledge each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import shlex
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from quire.transfer.endpoint import Endpoint
    from quire.transfer.state import Event, TransferRef

POOL_BYTES = 256 << 20
WINDOW_BYTES = 64 << 20
WARM_BYTES = 32 << 20
RESULTS = Path(__file__).parent / "results"

# name -> (transport or None for the bare loop, environment of both processes)
VARIANTS: dict[str, tuple[str | None, dict[str, str]]] = {
    "socket": (None, {}),
    "socket+xxh3": (None, {"SUM": "1"}),
    "tcp": ("tcp", {}),
    "grpc": ("grpc", {}),
    "nixl shm": ("nixl", {"UCX_TLS": "cma,posix,self,tcp"}),
    "nixl tcp": ("nixl", {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}),
}


def cpu_s() -> float:
    """CPU seconds of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---- the bare loop


def socket_receive(pipe: Connection, block: int) -> None:
    pool = memoryview(np.ones(POOL_BYTES, np.uint8))
    summed = "SUM" in os.environ
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        link, _ = server.accept()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while (total := pipe.recv()) is not None:
        link.sendall(b"g")
        before, at = cpu_s(), 0
        for _ in range(total // block):
            view, got = pool[at : at + block], 0
            while got < block:
                got += link.recv_into(view[got:])
            if summed:
                xxhash.xxh3_64_intdigest(view)
            at = (at + block) % POOL_BYTES
        link.sendall(b"k")
        pipe.send(cpu_s() - before)


def socket_send(pipe: Connection, block: int) -> None:
    pool = memoryview(np.ones(POOL_BYTES, np.uint8))
    summed = "SUM" in os.environ
    link = socket.create_connection(("127.0.0.1", pipe.recv()))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while (total := pipe.recv()) is not None:
        link.recv(1)
        before, start, at = cpu_s(), time.perf_counter(), 0
        for _ in range(total // block):
            view = pool[at : at + block]
            if summed:
                xxhash.xxh3_64_intdigest(view)
            link.sendall(view)
            at = (at + block) % POOL_BYTES
        link.recv(1)
        pipe.send((time.perf_counter() - start, cpu_s() - before))


# ---- the transports


def endpoint_of(transport: str, block: int, on_event: Any) -> Endpoint:
    from quire.config.transfer import TransferConfig
    from quire.transfer.endpoint import Endpoint
    from quire.transfer.layout import BlockLayout, Shard
    from quire.transfer.memory import HostMemory
    from quire.transfer.negotiate import Identity
    from quire.transfer.state import new_number

    # head_bytes = layers * 2 * 16 tokens * 64 * 2 bytes = layers * 4 KiB
    layout = BlockLayout("bench", "bfloat16", 16, block // 8 // 4096, 8, 64)
    config = TransferConfig(kv_transports=(transport,))
    identity = Identity(layout, Shard(), "bench", new_number(), config.kv_heartbeat_s)
    pool = np.ones((POOL_BYTES // block, block), np.uint8)
    return Endpoint(config, identity, HostMemory(pool, block), on_event)


class Receiving:
    """Grants window after window of one transfer, over the same blocks of the pool."""

    def __init__(self, transport: str, block: int) -> None:
        self.endpoint = endpoint_of(transport, block, self.on_event)
        self.slots = POOL_BYTES // block
        self.step = max(WINDOW_BYTES // block // 4, 1)
        self.done = threading.Event()
        self.ref: TransferRef | None = None
        self.total = self.granted = self.delivered = 0

    def begin(self, total: int) -> TransferRef:
        self.total, self.granted, self.delivered = total, 0, 0
        self.done.clear()
        self.ref = self.endpoint.receive(total)
        for _ in range(4):
            self.grant()
        return self.ref

    def grant(self) -> None:
        count = min(self.step, self.total - self.granted)
        if count and self.ref is not None:
            slots = [(self.granted + i) % self.slots for i in range(count)]
            self.endpoint.grant(self.ref, self.granted, slots)
            self.granted += count

    def on_event(self, event: Event) -> None:
        from quire.transfer.state import Delivered, Ended

        if isinstance(event, Delivered):
            self.delivered += 1
            if self.delivered % self.step == 0:
                self.grant()
        elif isinstance(event, Ended):
            assert event.failure is None, event
            self.done.set()


def transport_receive(pipe: Connection, block: int, transport: str) -> None:
    receiving = Receiving(transport, block)
    pipe.send(receiving.endpoint.start())
    while (total := pipe.recv()) is not None:
        before = cpu_s()
        pipe.send(receiving.begin(total // block))
        receiving.done.wait()
        pipe.send(cpu_s() - before)
    receiving.endpoint.close()


def transport_send(pipe: Connection, block: int, transport: str) -> None:
    from quire.transfer.state import Ended

    done = threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, Ended):
            assert event.failure is None, event
            done.set()

    endpoint = endpoint_of(transport, block, on_event)
    endpoint.start()
    peer, slots = pipe.recv(), POOL_BYTES // block
    while (message := pipe.recv()) is not None:
        total, ref = message
        count = total // block
        done.clear()
        before, start = cpu_s(), time.perf_counter()
        endpoint.send(ref, peer)
        endpoint.offer(ref, 0, [i % slots for i in range(count)])
        endpoint.commit(ref, blocks=count, tokens=count * 16)
        done.wait()
        pipe.send((time.perf_counter() - start, cpu_s() - before))
    endpoint.close()


# ---- one measurement


def child(pipe: Connection, role: str, transport: str | None, block: int) -> None:
    if transport is None:
        (socket_receive if role == "receive" else socket_send)(pipe, block)
    else:
        (transport_receive if role == "receive" else transport_send)(pipe, block, transport)


def measure(name: str, block: int, total: int) -> dict[str, float]:
    """One variant in two fresh processes: GB/s, CPU seconds per GB of each side."""
    transport, environment = VARIANTS[name]
    context = multiprocessing.get_context("spawn")
    saved = dict(os.environ)
    os.environ.update(environment)
    try:
        pipes, processes = {}, []
        for role in ("receive", "send"):
            pipes[role], theirs = context.Pipe()
            arguments = (theirs, role, transport, block)
            processes.append(context.Process(target=child, args=arguments, daemon=True))
            processes[-1].start()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    receiver, sender = pipes["receive"], pipes["send"]
    sender.send(receiver.recv())
    for size in (WARM_BYTES, total):
        receiver.send(size)
        sender.send(size if transport is None else (size, receiver.recv()))
        if not sender.poll(120):
            raise SystemExit(f"{name} did not finish")
        seconds, sent_cpu = sender.recv()
        received_cpu = receiver.recv()
    for pipe in (sender, receiver):
        pipe.send(None)
    for process in processes:
        process.join(20)
        process.kill()
    gb = total / 1e9
    return {"gb_s": gb / seconds, "sender": sent_cpu / gb, "receiver": received_cpu / gb}


def table(block: int, measured: dict[str, list[dict[str, float]]]) -> tuple[str, dict[str, Any]]:
    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in measured[name])

    lines = [
        f"blocks of {block >> 10} KiB",
        f"{'':14}{'GB/s':>7}{'(min-max)':>14}{'ratio':>8}{'CPU s/GB: sender':>18}{'receiver':>10}",
    ]
    summary = {}
    for name, runs in measured.items():
        # Ratios within a round first: the machine's other work changes between rounds.
        pairs = zip(runs, measured["socket"], strict=True)
        ratio = statistics.median(run["gb_s"] / base["gb_s"] for run, base in pairs)
        low, high = min(r["gb_s"] for r in runs), max(r["gb_s"] for r in runs)
        sent, received = median(name, "sender"), median(name, "receiver")
        summary[name] = {
            "gb_s": median(name, "gb_s"), "ratio": ratio, "sender": sent, "receiver": received,
        }  # fmt: skip
        lines.append(
            f"{name:14}{median(name, 'gb_s'):7.2f}{f'({low:.2f}-{high:.2f})':>14}{ratio:8.2f}"
            f"{sent:18.2f}{received:10.2f}"
        )
    return "\n".join(lines), summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=2.0, help="sent per measurement")
    parser.add_argument("--block-kib", type=int, nargs="+", default=[1024, 64])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    names = ["socket", *(n for n in options.variants if n != "socket")]
    if importlib.util.find_spec("nixl_cu12") is None:
        names = [name for name in names if VARIANTS[name][0] != "nixl"]
    texts, results = [], {}
    for kib in options.block_kib:
        block = kib << 10
        total = int(options.gib * (1 << 30)) // block * block
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names:
                measured[name].append(measure(name, block, total))
                latest = measured[name][-1]
                print(f"  {number + 1} {name:12} {latest['gb_s']:.2f} GB/s", file=sys.stderr)
        text, summary = table(block, measured)
        texts.append(text)
        results[f"{kib}KiB"] = {"median": summary, "runs": measured}
    command = "python loadtest/kv_transfer.py " + shlex.join(sys.argv[1:])
    header = (
        f"$ {command.strip()}\n{os.cpu_count()} CPUs ({platform.machine()}), Python "
        f"{platform.python_version()}, load average at the end {os.getloadavg()[0]:.1f}"
    )
    report = "\n\n".join([header, *texts]) + "\n"
    print(report)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kv_transfer.txt").write_text(report)
    (RESULTS / "kv_transfer.json").write_text(
        json.dumps(
            {"command": command.strip(), "cpus": os.cpu_count(), "blocks": results}, indent=1
        )
    )


if __name__ == "__main__":
    main()
