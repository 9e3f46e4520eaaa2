"""Readiness follows what a worker can do for a request: see docs/operations.md."""

from __future__ import annotations

import pytest
import pytest_asyncio
from inprocess import LocalWorker

from quire.config.engine import EngineConfig
from quire.config.transfer import TransferConfig
from quire.proto import worker_pb2

WEIGHTS = {"prefill": (1.0, 0.0), "decode": (0.0, 1.0), "both": (1.0, 1.0), "hardly": (0.1, 0.0)}


@pytest_asyncio.fixture
async def worker(tmp_path):
    config = EngineConfig(kv_cache_memory_bytes=64 << 20, num_threads=1)
    worker = await LocalWorker(tmp_path, "worker").start(config, TransferConfig())
    yield worker
    await worker.stop()


async def health(worker: LocalWorker) -> worker_pb2.HealthReport:
    request = worker_pb2.ControlRequest(health=worker_pb2.Health())
    return (await worker.stub.Control(request, timeout=10)).health


@pytest.mark.parametrize("role", WEIGHTS)
async def test_a_worker_of_any_role_is_ready_and_one_without_is_refused(worker, role) -> None:
    prefill, decode = WEIGHTS[role]
    weights = worker_pb2.SetRole(prefill_weight=prefill, decode_weight=decode)
    assert (await worker.stub.Control(worker_pb2.ControlRequest(set_role=weights))).ok
    assert (await health(worker)).ready
    none = worker_pb2.ControlRequest(set_role=worker_pb2.SetRole())
    assert not (await worker.stub.Control(none)).ok
    assert (await health(worker)).ready, "it keeps the role it had"


async def test_a_worker_that_has_lost_its_peer_answers_and_stays_ready(worker, tmp_path) -> None:
    submit = worker_pb2.Submit(
        request=0, request_id="r", attempt=1, prompt_token_ids=[*range(100, 400)],
        sampling={"n": 1, "max_tokens": 4, "seed": 1},
    )  # fmt: skip
    submit.prefill.worker, submit.prefill.address = "gone", f"unix:{tmp_path}/gone.sock"
    [answer] = await worker.ask([submit])
    assert len(answer.tokens[0]) == 4
    report = await health(worker)
    (peer,) = report.peers
    assert peer.address == submit.prefill.address
    assert peer.state != "ready"
    assert report.ready


async def test_a_worker_that_drains_is_alive_and_not_ready(worker) -> None:
    worker.service.drain(60.0)
    report = await health(worker)
    assert report.live
    assert not report.ready
