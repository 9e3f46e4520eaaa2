"""Prefill and decode workers, each a process, with a wire between them that loses, repeats, delays
and damages: tokens and log-probabilities are those of one engine, and no block is kept."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
from damaging_proxy import HERE, THERE, proxy
from rollout import free_ports
from test_disaggregated import ENGINE, prompt, same, submit
from workers import WorkerProcess, ask

from quire.transfer.faults import FaultPlan

ROUNDS = 2
IMPATIENT = {"kv_heartbeat_s": 0.3, "kv_lease_s": 2.0}
FAULTS = {
    "corrupt": {"corrupt": 0.1},
    "duplicate": {"duplicate": 0.3},
    "late": {"reorder": 0.1, "delay": 0.05},
    "drop": {"drop": 0.05},
}
HELD_UP_BYTES = {"corrupt": {"corrupt": 0.2}, "late": {"delay": 0.1, "delay_s": 0.1}}
"""What can be done to gRPC from outside; the rest is done to it in test_kv_content.py."""
TRANSPORTS = [
    "tcp",
    pytest.param("grpc", marks=pytest.mark.slow),
    pytest.param("nixl", marks=pytest.mark.slow),
]


class Pair:
    """A prefill worker, and a decode worker that others reach by a proxy."""

    def __init__(self, folder, transport: str) -> None:
        [self.port] = free_ports(1)
        self.frames = transport != "grpc"
        common = IMPATIENT | {"kv_transports": [transport]}
        behind = {
            "kv_host": THERE, "kv_advertised_host": HERE,
            "kv_tcp_port" if self.frames else "kv_grpc_port": self.port,
        }  # fmt: skip
        # small steps, so that a prompt is sent in many pieces
        slow = ENGINE | {"max_num_batched_tokens": 32}
        self.prefill = WorkerProcess(folder, "prefill", slow, common)
        self.decode = WorkerProcess(folder, "decode", ENGINE, common | behind)
        self.both = WorkerProcess(folder, "both", ENGINE)
        self.all = (self.prefill, self.decode, self.both)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=TRANSPORTS)
async def pair(request, tmp_path_factory):
    if request.param == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    pair = Pair(tmp_path_factory.mktemp("sockets"), request.param)
    try:
        await asyncio.gather(*(worker.ready() for worker in pair.all))
        yield pair
    finally:
        await asyncio.gather(*(worker.stop() for worker in pair.all))


def batch(seed: int, hint: WorkerProcess | None):
    return [
        submit(
            i, prompt(1000 * seed + i, 60 + 97 * i), hint,
            temperature=0.9, seed=i, n=1 + i % 2, logprobs=2,
        )
        for i in range(6)
    ]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("faults", FAULTS)
async def test_answers_are_those_of_one_engine(pair, faults) -> None:
    wanted = FAULTS[faults] if pair.frames else HELD_UP_BYTES.get(faults)
    if wanted is None:
        pytest.skip("of gRPC that is tested within one process: test_kv_content.py")
    plan = FaultPlan(seed=5, **wanted)
    received = await pair.decode.metric('quire_kv_transfer_bytes_total{direction="received"')
    async with proxy(plan, pair.port, frames=pair.frames) as carrier:
        for number in range(ROUNDS):
            seed = 10 * list(FAULTS).index(faults) + number + 1
            got, want = await asyncio.gather(
                ask(pair.decode, batch(seed, pair.prefill)), ask(pair.both, batch(seed, None))
            )
            same(got, want)
            for worker in (pair.decode, pair.prefill):
                await worker.wait_released()
    assert carrier.num_connections > 0, "the wire led elsewhere"
    assert plan.done.keys() == wanted.keys() - {"delay_s"}, "not all of it happened"
    page = 'quire_kv_transfer_bytes_total{direction="received"'
    assert await pair.decode.metric(page) > received, "nothing arrived"
