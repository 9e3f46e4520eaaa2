"""The part of `quire doctor` that is about workers: each of them, and every ordered pair."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from quire.cli.checks import Check
from quire.cli.workers import CHANNEL_OPTIONS, Seen, WorkerError, look, words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quire.cluster.rpc import Cluster
    from quire.proto import transfer_pb2, worker_pb2

PROBE_TIMEOUT_S = 40.0
"""For all transports of a pair; the worker itself gives each 10 s."""


@dataclass(frozen=True)
class Pair:
    """One transport from one worker to another. Without a measurement, `problem` says why."""

    source: str
    target: str
    transport: str
    gigabytes_per_s: float = 0.0
    latency_p50_ms: float = 0.0
    latency_p99_ms: float = 0.0
    ms_per_1k_tokens: float = 0.0
    """Time that the keys and values of a thousand tokens take."""
    same_layout: bool = True
    problem: str = ""


async def look_at_all(cluster: Cluster, named: Mapping[str, str]) -> tuple[list[Seen], list[Check]]:
    """The workers that answer, and a finding about each."""
    answers = await asyncio.gather(
        *(look(cluster, name, address) for name, address in named.items()), return_exceptions=True
    )
    seen, checks = [], []
    for name, answer in zip(named, answers, strict=True):
        if isinstance(answer, Seen):
            seen.append(answer)
            checks.append(_describe(answer))
        elif isinstance(answer, WorkerError):
            advice = "is it running, reachable from here, and is QUIRE_CLUSTER_TOKEN the same?"
            checks.append(Check(name, "fail", str(answer), advice))
        else:
            raise answer
    return seen, checks


def _describe(seen: Seen) -> Check:
    model, kv = seen.model, seen.model.kv
    ways = ", ".join(f"{x.transport} {x.address}" for x in kv.listeners)
    found = f"{model.model} {model.dtype}, {seen.role}"
    if seen.load.draining:
        found += ", asleep" if seen.load.sleeping else ", draining"
    if not model.HasField("kv"):
        advice = "fine alone; to exchange blocks start it with `quire worker`"
        return Check(seen.name, "ok", f"{found}, exchanges no KV blocks ({advice})")
    return Check(seen.name, "ok", f"{found}, layout {kv.fingerprint.hex()[:12]}, {ways}")


async def measure_all(cluster: Cluster, seen: Sequence[Seen], probe_bytes: int) -> list[Pair]:
    """Every ordered pair, one after the other: together they would share the network."""
    able = [worker for worker in seen if worker.model.HasField("kv")]
    pairs: list[Pair] = []
    for source, target in permutations(able, 2):
        pairs += await _measure(cluster, source, target, probe_bytes)
    return pairs


async def _measure(cluster: Cluster, source: Seen, target: Seen, probe_bytes: int) -> list[Pair]:
    """One pair, every transport that both have."""
    import grpc

    from quire.proto import worker_pb2
    from quire.proto.worker_pb2_grpc import WorkerStub

    problem = mismatch(source.model, target.model)
    if problem:
        return [_failed(source, target, "", problem, same_layout=False)]
    offered = [x.transport for x in target.model.kv.listeners]
    both = [name for name in source.model.kv.capabilities if name in offered]
    if not both:
        return [_failed(source, target, "", f"no transport in common, it has {offered}")]
    probe = worker_pb2.Probe(peer=_peer(target), transports=both, bytes=probe_bytes)
    try:
        async with cluster.channel(source.address, CHANNEL_OPTIONS) as channel:
            reply = await WorkerStub(channel).Control(
                worker_pb2.ControlRequest(probe=probe), timeout=PROBE_TIMEOUT_S
            )
    except grpc.aio.AioRpcError as error:
        return [_failed(source, target, name, words(error)) for name in both]
    if not reply.ok:
        return [_failed(source, target, name, reply.message) for name in both]
    return [_measured(source, target, result) for result in reply.probes]


def mismatch(source: worker_pb2.ModelInfo, target: worker_pb2.ModelInfo) -> str:
    """Why two workers cannot exchange blocks, in words; empty when they can."""
    from quire.transfer.negotiate import differences

    if source.kv.wire_version != target.kv.wire_version:
        return f"wire version {target.kv.wire_version} here {source.kv.wire_version}"
    if source.kv.fingerprint == target.kv.fingerprint:
        return ""
    return ", ".join(differences(target.kv.layout, source.kv.layout)) or "fingerprints differ"


def _peer(seen: Seen) -> transfer_pb2.KvPeer:
    from quire.proto import transfer_pb2

    kv = seen.model.kv
    return transfer_pb2.KvPeer(
        worker=kv.worker, incarnation=kv.incarnation, rank=kv.rank, degree=kv.degree,
        listeners=kv.listeners,
    )  # fmt: skip


def _failed(
    source: Seen, target: Seen, transport: str, problem: str, *, same_layout: bool = True
) -> Pair:
    return Pair(source.name, target.name, transport, same_layout=same_layout, problem=problem)


def _measured(source: Seen, target: Seen, result: worker_pb2.ProbeResult) -> Pair:
    if result.failure:
        same = result.failure != "incompatible"
        problem = f"{result.failure}: {result.detail}"
        return _failed(source, target, result.transport, problem, same_layout=same)
    model = source.model
    per_1k = 1000 / model.block_size * model.block_bytes / result.bytes_per_s
    return Pair(
        source.name,
        target.name,
        result.transport,
        gigabytes_per_s=round(result.bytes_per_s / 1e9, 3),
        latency_p50_ms=round(result.latency_p50_s * 1e3, 3),
        latency_p99_ms=round(result.latency_p99_s * 1e3, 3),
        ms_per_1k_tokens=round(per_1k * 1e3, 3),
    )
