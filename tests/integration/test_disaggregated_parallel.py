"""Prefill and decode workers of different tensor-parallel degrees: the same answers as one process.

Half of the pairs in the default suite, one of each transport; the others in the slow one.
"""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
import pytest_asyncio
from test_disaggregated import ENGINE, FEATURES, prompt, submit
from workers import WorkerProcess, ask

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl_cu12") is None, reason="needs nixl-cu12"
)
PAIRS = [
    pytest.param((2, 1, "tcp"), id="2-1-tcp"),
    pytest.param((1, 2, "grpc"), id="1-2-grpc"),
    pytest.param((1, 2, "tcp"), id="1-2-tcp", marks=pytest.mark.slow),
    pytest.param((2, 1, "grpc"), id="2-1-grpc", marks=pytest.mark.slow),
    pytest.param((2, 2, "tcp"), id="2-2-tcp", marks=pytest.mark.slow),
    pytest.param((1, 2, "nixl"), id="1-2-nixl", marks=[pytest.mark.slow, needs_nixl]),
    pytest.param((2, 1, "nixl"), id="2-1-nixl", marks=[pytest.mark.slow, needs_nixl]),
]
TRANSFER = {"kv_heartbeat_s": 5.0, "kv_lease_s": 60.0}


class Trio:
    """A decode and a prefill worker of some degrees, and one process that does both."""

    def __init__(self, folder, prefill: int, decode: int, transport: str) -> None:
        engine = ENGINE | {"dtype": "float32"}
        transfer = TRANSFER | {"kv_transports": [transport]}

        def worker(name: str, degree: int, transfer: dict | None) -> WorkerProcess:
            return WorkerProcess(folder, name, engine | {"tensor_parallel_size": degree}, transfer)

        self.decode = worker("decode", decode, transfer)
        self.prefill = worker("prefill", prefill, transfer)
        self.both = worker("both", 1, None)
        self.all = (self.decode, self.prefill, self.both)


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trio(tmp_path_factory, pair):
    trio = Trio(tmp_path_factory.mktemp("sockets"), *pair)
    try:
        await asyncio.gather(*(worker.ready() for worker in trio.all))
        yield trio
    finally:
        await asyncio.gather(*(worker.stop() for worker in trio.all))


def same_tokens(got, want) -> None:
    assert [a.failure for a in got] == [None] * len(got)
    assert [a.tokens for a in got] == [a.tokens for a in want]
    assert [a.ended for a in got] == [a.ended for a in want]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("feature", ["greedy", "seeded", "choices", "one_token"])
async def test_tokens_are_those_of_one_process(trio, feature) -> None:
    sampling = FEATURES[feature]
    ids = [prompt(200 + list(FEATURES).index(feature), length) for length in (40, 96, 300, 700)]
    computed = await trio.decode.metric("quire_step_tokens_sum")
    got = await ask(
        trio.decode, [submit(i, p, trio.prefill, **sampling) for i, p in enumerate(ids)]
    )
    same_tokens(got, await ask(trio.both, [submit(i, p, **sampling) for i, p in enumerate(ids)]))
    answered = sum(len(t) for a in got for t in a.tokens.values())
    # the decode worker computed no prompt, only what follows the first tokens
    assert await trio.decode.metric("quire_step_tokens_sum") - computed < answered
    for worker in (trio.decode, trio.prefill):
        await worker.wait_released()


@pytest.mark.asyncio(loop_scope="module")
async def test_many_at_once_with_prefixes_and_aborts(trio) -> None:
    """Cached prefixes on either side, and requests that are given up while blocks arrive."""
    shared = prompt(50, 200)

    def batch(hint):
        return [
            submit(i, shared[: 40 * (i % 5)] + prompt(i, 20 + 37 * i % 400), hint, seed=i)
            for i in range(16)
        ]

    async def give_up() -> None:
        long = [submit(i, prompt(900 + i, 900), trio.prefill, max_tokens=60) for i in range(4)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await ask(trio.decode, long)

    got, want, _ = await asyncio.gather(
        ask(trio.decode, batch(trio.prefill)), ask(trio.both, batch(None)), give_up()
    )
    same_tokens(got, want)
    for worker in (trio.decode, trio.prefill):
        await worker.wait_released()
