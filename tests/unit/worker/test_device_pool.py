"""A worker whose KV cache is in a GPU's memory, told apart by the backend alone: torch on a CPU,
whose pool is said to be no host memory."""

from __future__ import annotations

import pytest
from inprocess import LocalWorker

from quire.config.engine import EngineConfig
from quire.config.transfer import TransferConfig
from quire.engine.runner.backend import TorchBackend
from quire.proto import worker_pb2
from quire.transfer.memory import HostMemory
from quire.transfer.staging import StagedMemory

CONFIG = EngineConfig(
    dtype="float32", kv_cache_memory_bytes=24 << 20, max_model_len=1024, max_num_batched_tokens=96,
    num_threads=1, enforce_eager=True,
)  # fmt: skip
FEW_PLACES = TransferConfig(kv_staging_bytes=8 * (96 << 10), kv_heartbeat_s=5.0, kv_lease_s=60.0)


@pytest.fixture
def on_device(monkeypatch):
    monkeypatch.setattr(TorchBackend, "host_pool", lambda _: None)


def submit(number: int, hint: LocalWorker | None) -> worker_pb2.Submit:
    length = 150 + 90 * number
    message = worker_pb2.Submit(
        request=number, request_id=f"r{number}", attempt=1,
        prompt_token_ids=[(7 * i + number) % 8000 + 10 for i in range(length)],
        sampling={"n": 2, "max_tokens": 8, "seed": number, "temperature": 0.8},
    )  # fmt: skip
    if hint is not None:
        message.prefill.worker, message.prefill.address = hint.name, hint.address
    return message


def cached(worker: LocalWorker) -> dict[bytes, bytes]:
    """Content of every block that the prefix cache knows, by hash."""
    pool = worker.engine.model.runner.backend.ops.pool
    return {h: pool[b].numpy().tobytes() for h, b in worker.engine.pool._by_hash.items()}


def memory(worker: LocalWorker):
    return worker.service._disaggregation.endpoint._core.node.memory


async def test_prompts_are_computed_for_others_and_by_others(on_device, tmp_path) -> None:
    left, right, alone = (LocalWorker(tmp_path, name) for name in ("left", "right", "alone"))
    for worker in (left, right):
        await worker.start(CONFIG, FEW_PLACES)
        assert isinstance(memory(worker), StagedMemory)
    await alone.start(CONFIG, None)
    try:
        got = await right.ask([submit(i, left) for i in range(3)])
        want = await alone.ask([submit(i, None) for i in range(3)])
        assert [a.failure for a in got] == [None] * 3
        assert [a.tokens for a in got] == [a.tokens for a in want]
        for worker in (left, right):
            await worker.idle()
            worker.engine.pool.check_integrity()
            assert memory(worker).outbound.num_taken == memory(worker).inbound.num_taken == 0
        here, there = cached(left), cached(right)
        shared = here.keys() & there.keys()
        assert len(shared) >= sum((150 + 90 * i) // 16 for i in range(3))
        assert all(here[block] == there[block] for block in shared)
    finally:
        for worker in (left, right, alone):
            await worker.stop()


async def test_a_pool_in_host_memory_has_no_staging_and_asks_for_none(tmp_path) -> None:
    worker = LocalWorker(tmp_path, "host")
    await worker.start(CONFIG, TransferConfig(kv_staging_bytes=1))
    try:
        assert isinstance(memory(worker), HostMemory)
        pool = worker.engine.model.runner.backend.host_pool()
        assert memory(worker).view(3, 0, 8).obj is not None
        pool[3, 0] = 77
        assert memory(worker).view(3, 0, 8)[0] == 77, "a copy"
    finally:
        await worker.stop()


async def test_too_little_staging_is_said_with_what_would_do(on_device, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"give at least {2 * (96 << 10)}"):
        await LocalWorker(tmp_path, "small").start(CONFIG, TransferConfig(kv_staging_bytes=1 << 16))
