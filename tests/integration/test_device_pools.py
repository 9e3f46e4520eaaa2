"""Pools in device memory, exchanged through a few places in host memory: the answers are those of
one process, between such pools and with pools in host memory, both ways, over real wires.

Without a GPU a CPU pool passes for a device's (`in_worker`); `pytest -m gpu` has real ones.
"""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
import torch
from test_disaggregated import ENGINE, FEATURES, prompt, same, submit
from test_disaggregated_parallel import same_tokens
from test_migration import Mover, forget
from workers import WorkerProcess, ask

BLOCK_BYTES = 96 << 10
TRANSFER = {"kv_heartbeat_s": 5.0, "kv_lease_s": 60.0}
FEW_PLACES = {"kv_staging_bytes": 10 * BLOCK_BYTES}
HAS_CUDA = torch.cuda.is_available()


class Trio:
    """Two workers that exchange blocks, and one that does both jobs."""

    def __init__(self, folder, left: dict, right: dict, transport: str, **engine) -> None:
        transfer = TRANSFER | {"kv_transports": [transport]}

        def worker(name: str, pool="host", degree=1, staging=FEW_PLACES) -> WorkerProcess:
            options = ENGINE | {"dtype": "float32", "tensor_parallel_size": degree} | engine
            environment = {"QUIRE_TEST_POOL": pool}
            return WorkerProcess(folder, name, options, transfer | staging, environment=environment)

        self.left, self.right = worker("left", **left), worker("right", **right)
        self.alone = worker("alone")
        self.all = (self.left, self.right, self.alone)

    async def __aenter__(self):
        await asyncio.gather(*(worker.ready() for worker in self.all))
        return self

    async def __aexit__(self, *_):
        await asyncio.gather(*(worker.stop() for worker in self.all))

    async def check(self, prefill: WorkerProcess, decode: WorkerProcess, is_same, feature) -> None:
        """Prompts that one computes for the other are answered as by one process, and every block
        is given back."""
        lengths = (40, 96, 300, 700)
        seed = 300 + list(FEATURES).index(feature)
        asked = [(i, prompt(seed, length)) for i, length in enumerate(lengths)]
        computed = await decode.metric("quire_step_tokens_sum")
        sampling = FEATURES[feature]
        got = await ask(decode, [submit(i, ids, prefill, **sampling) for i, ids in asked])
        is_same(got, await ask(self.alone, [submit(i, ids, **sampling) for i, ids in asked]))
        answered = sum(len(t) for a in got for t in a.tokens.values())
        # the decode worker computed no prompt, only what follows the first tokens
        assert await decode.metric("quire_step_tokens_sum") - computed < answered
        await asyncio.gather(prefill.wait_released(), decode.wait_released())
        await forget(prefill, decode)


@pytest.fixture(
    scope="module", params=["tcp", "grpc", pytest.param("nixl", marks=pytest.mark.slow)]
)
def transport(request):
    if request.param == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trio(tmp_path_factory, transport):
    folder = tmp_path_factory.mktemp("sockets")
    async with Trio(folder, {"pool": "device"}, {"pool": "host"}, transport) as trio:
        yield trio


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("feature", ["greedy", "logprobs"])
@pytest.mark.parametrize("way", ["device to host", "host to device"])
async def test_answers_are_those_of_one_process(trio, way, feature) -> None:
    prefill, decode = (trio.left, trio.right)[:: 1 if way == "device to host" else -1]
    await trio.check(prefill, decode, same, feature)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("way", ["device to host", "host to device"])
async def test_many_at_once_and_requests_that_are_given_up(trio, way) -> None:
    """All over five places in each direction."""
    prefill, decode = (trio.left, trio.right)[:: 1 if way == "device to host" else -1]

    def batch(hint):
        return [
            submit(i, prompt(i, 20 + 37 * i % 400), hint, seed=i, n=1 + i % 2) for i in range(16)
        ]

    async def give_up() -> None:
        long = [submit(i, prompt(900 + i, 900), prefill, max_tokens=60) for i in range(4)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await ask(decode, long)

    got, want, _ = await asyncio.gather(
        ask(decode, batch(prefill)), ask(trio.alone, batch(None)), give_up()
    )
    same(got, want)
    await asyncio.gather(prefill.wait_released(), decode.wait_released())
    await forget(prefill, decode)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("way", ["device to host", "host to device"])
async def test_a_request_that_moves_takes_its_blocks_along(trio, way) -> None:
    source, target = (trio.left, trio.right)[:: 1 if way == "device to host" else -1]
    sampling = {"max_tokens": 120, "ignore_eos": True, "temperature": 0.9, "seed": 3, "n": 2}
    ids = prompt(31, 300)
    [want] = await ask(trio.alone, [submit(1, ids, **sampling)])
    blocks = await target.metric("quire_migrated_blocks_total")
    mover = Mover(submit(2, ids, **sampling))
    await mover.run(source, 30)
    mover.resume(source)
    await mover.run(target)
    assert (mover.answer.tokens, mover.answer.ended) == (want.tokens, want.ended)
    assert await target.metric("quire_migrated_blocks_total") >= blocks + 300 // 16
    await asyncio.gather(source.wait_released(), target.wait_released())
    await forget(source, target)


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [
        pytest.param(2, 1, "tcp", id="2-1-tcp"),
        pytest.param(1, 2, "grpc", id="1-2-grpc", marks=pytest.mark.slow),
        pytest.param(2, 2, "tcp", id="2-2-tcp", marks=pytest.mark.slow),
    ],
)
async def test_ranks_of_any_degree(tmp_path, prefill, decode, transport) -> None:
    left, right = ({"pool": "device", "degree": degree} for degree in (prefill, decode))
    async with Trio(tmp_path, left, right, transport) as trio:
        await trio.check(trio.left, trio.right, same_tokens, "choices")
        await trio.check(trio.right, trio.left, same_tokens, "greedy")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no GPU")
@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_on_gpus(tmp_path, transport) -> None:
    """fp32, so that other kernels for other batches leave the tokens alone."""
    engine = {"device": "cuda", "kv_cache_memory_bytes": 64 << 20}
    async with Trio(tmp_path, {}, {}, transport, **engine) as trio:
        for feature in ("greedy", "seeded", "choices"):
            await trio.check(trio.left, trio.right, same_tokens, feature)
            await trio.check(trio.right, trio.left, same_tokens, feature)
