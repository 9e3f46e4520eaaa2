"""What the caches hold: a block of a given hash has the same bits on every worker, however it came
there (computed in whatever chunks, beside whatever else, or received), and whatever the wire does.

Prompts share prefixes of random lengths, so several transfers carry the same blocks at once and the
receiver keeps one of them; the pools are small, so that blocks change hands.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from inprocess import LocalWorker

from quire.config.engine import EngineConfig
from quire.config.transfer import TransferConfig
from quire.proto import worker_pb2
from quire.transfer import endpoint
from quire.transfer.faults import FaultPlan, FaultyTransport
from quire.transfer.transports import make_transports

ROUNDS = 4
FAULTS = {
    "corrupt": {"corrupt": 0.05},
    "duplicate": {"duplicate": 0.2},
    "reorder": {"reorder": 0.1, "duplicate": 0.1},
    "drop": {"drop": 0.03},
    "delay": {"delay": 0.05, "delay_s": 0.02},
    "everything": {"drop": 0.01, "duplicate": 0.05, "reorder": 0.05, "corrupt": 0.02},
}
NIXL_FAULTS = {name: plan for name, plan in FAULTS.items() if "delay" not in plan}


def engine(dtype: str, budget: int) -> EngineConfig:
    return EngineConfig(
        dtype=dtype, kv_cache_memory_bytes=24 << 20, max_num_seqs=16, max_model_len=1024,
        max_num_batched_tokens=budget, num_threads=1,
    )  # fmt: skip


def batch(rng: random.Random, hint: LocalWorker) -> list[worker_pb2.Submit]:
    """Prompts that begin alike for a while, with whatever sampling."""
    base = [rng.randrange(10, 8000) for _ in range(400)]
    submits = []
    for number in range(rng.randrange(2, 8)):
        length = rng.randrange(20, 400)
        shared = rng.choice([0, length, length, rng.randrange(length)])
        submit = worker_pb2.Submit(
            request=number, request_id=f"r{number}", attempt=1,
            prompt_token_ids=base[:shared]
            + [rng.randrange(10, 8000) for _ in range(length - shared)],
            sampling={
                "n": rng.choice([1, 1, 2, 3]), "max_tokens": rng.randrange(1, 24), "logprobs": 2,
                "seed": rng.randrange(1 << 30), "temperature": rng.choice([0.0, 0.7, 1.0]),
            },
        )  # fmt: skip
        submit.prefill.worker, submit.prefill.address = hint.name, hint.address
        submits.append(submit)
    return submits


def alone(submits: list[worker_pb2.Submit]) -> list[worker_pb2.Submit]:
    """The same requests, to be answered by one worker."""
    copies = []
    for submit in submits:
        copy = worker_pb2.Submit.FromString(submit.SerializeToString())
        copy.ClearField("prefill")
        copies.append(copy)
    return copies


async def compare(folder, dtype: str, transfer: TransferConfig, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    prefill, decode, both = (LocalWorker(folder, name) for name in ("prefill", "decode", "both"))
    await prefill.start(engine(dtype, rng.choice([16, 48, 96])), transfer)
    await decode.start(engine(dtype, 96), transfer)
    await both.start(engine(dtype, 96), None)
    try:
        for _ in range(rounds):
            submits = batch(rng, prefill)
            got, want = await asyncio.gather(decode.ask(submits), both.ask(alone(submits)))
            assert [a.failure for a in got] == [None] * len(got)
            assert [a.tokens for a in got] == [a.tokens for a in want]
            assert [a.logprobs for a in got] == [a.logprobs for a in want]
            content: dict[bytes, bytes] = {}
            for worker in (both, prefill, decode):
                await worker.idle()
                worker.engine.pool.check_integrity()
                for block_hash, bits in worker.cached().items():
                    assert content.setdefault(block_hash, bits) == bits, worker.name
    finally:
        await asyncio.gather(prefill.stop(), decode.stop(), both.stop())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transport", ["tcp", "grpc", "nixl"])
async def test_a_block_has_the_same_bits_everywhere(tmp_path, dtype, transport) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    transfer = TransferConfig(kv_transports=(transport,), kv_heartbeat_s=5.0, kv_lease_s=60.0)
    await compare(tmp_path, dtype, transfer, ROUNDS, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("transport", ["tcp", "grpc", "nixl"])
async def test_a_block_has_the_same_bits_everywhere_for_long(tmp_path, transport, seed) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    transfer = TransferConfig(kv_transports=(transport,), kv_heartbeat_s=5.0, kv_lease_s=60.0)
    dtype = ("float32", "bfloat16")[seed % 2]
    await compare(tmp_path, dtype, transfer, 40 * ROUNDS, seed=10 + seed)


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_a_bad_wire_changes_no_bit(tmp_path, monkeypatch, transport, faults) -> None:
    transfer = TransferConfig(kv_transports=(transport,), kv_heartbeat_s=0.2, kv_lease_s=1.0)
    plan = FaultPlan(seed=3, **FAULTS[faults])
    plans = iter([plan, FaultPlan()])  # the prefill worker's, which starts first, and the other's

    def faulty(config, node):
        [inner] = make_transports(config, node)
        return [FaultyTransport(inner, next(plans))]

    monkeypatch.setattr(endpoint, "make_transports", faulty)
    await compare(tmp_path, "bfloat16", transfer, ROUNDS, seed=2)
    assert plan.done.keys() == FAULTS[faults].keys() - {"delay_s"}, "not all of it happened"


@pytest.mark.parametrize("faults", NIXL_FAULTS)
async def test_bad_notes_and_landing_slots_change_no_bit(tmp_path, monkeypatch, faults) -> None:
    """One-sided writes that are damaged in the slot where they land, and whose notes, which go both
    ways over a socket, are lost, repeated and late."""
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    from faulty_nixl import make_faulty

    transfer = TransferConfig(kv_transports=("nixl",), kv_heartbeat_s=0.2, kv_lease_s=1.0)
    plan = FaultPlan(seed=3, **NIXL_FAULTS[faults])
    make_faulty(monkeypatch, plan)
    await compare(tmp_path, "bfloat16", transfer, ROUNDS, seed=2)
    assert plan.done.keys() == NIXL_FAULTS[faults].keys(), "not all of it happened"
