"""A prefill worker that dies, hangs or is not there, and clients that leave, at any moment of a
transfer: the decode worker answers every request with the same tokens, and nobody keeps a block."""

from __future__ import annotations

import asyncio
import random
import signal

import pytest
from test_disaggregated import ENGINE, prompt, same, submit
from workers import WorkerProcess, ask

from quire.proto import worker_pb2

# Small steps and one slow pod: a prompt takes dozens of steps, so that a fault falls in between.
SLOW = ENGINE | {"max_num_batched_tokens": 16, "max_num_seqs": 16}
TRANSFER = {"kv_transports": ["tcp"], "kv_lease_s": 1.5, "kv_heartbeat_s": 0.2}


class Pair:
    def __init__(self, folder) -> None:
        self.folder = folder
        self.decode = WorkerProcess(folder, "decode", ENGINE, TRANSFER)
        self.prefill = WorkerProcess(folder, "prefill", SLOW, TRANSFER)

    async def restart_prefill(self) -> None:
        await self.prefill.stop()
        self.prefill = WorkerProcess(self.folder, "prefill", SLOW, TRANSFER)
        await self.prefill.ready()


@pytest.fixture
async def pair(tmp_path):
    pair = Pair(tmp_path)
    try:
        await asyncio.gather(pair.decode.ready(), pair.prefill.ready())
        yield pair
    finally:
        pair.prefill.kill(signal.SIGCONT)
        await asyncio.gather(pair.decode.stop(), pair.prefill.stop())


def batch(hint, seed: int, count: int = 6):
    rng = random.Random(seed)
    return [
        submit(
            i, prompt(1000 * seed + i, rng.randrange(60, 700)), hint,
            temperature=0.9, seed=seed, n=1 + i % 2, max_tokens=10,
        )
        for i in range(count)
    ]  # fmt: skip


async def with_fault(pair: Pair, seed: int, fault, delay: float):
    """The answers of a batch during which `fault` happens after `delay` seconds."""

    async def later() -> None:
        await asyncio.sleep(delay)
        fault()

    answers, _ = await asyncio.gather(ask(pair.decode, batch(pair.prefill, seed)), later())
    return answers


async def undisturbed(pair: Pair, seed: int):
    """The same batch on the decode worker alone, nothing cached."""
    await pair.decode.stub.Control(
        worker_pb2.ControlRequest(reset_prefix_cache=worker_pb2.ResetPrefixCache()), timeout=10
    )
    return await ask(pair.decode, batch(None, seed))


DELAYS = [0.0, 0.02, 0.05, 0.1, 0.2, 0.35]


async def test_a_prefill_worker_killed_at_any_moment(pair) -> None:
    for seed, delay in enumerate(DELAYS):
        got = await with_fault(pair, seed, pair.prefill.kill, delay)
        await pair.decode.wait_released()
        same(got, await undisturbed(pair, seed))
        await pair.restart_prefill()


async def test_a_prefill_worker_that_hangs_at_any_moment(pair) -> None:
    for seed, delay in enumerate(DELAYS[1:4]):
        stop = lambda: pair.prefill.kill(signal.SIGSTOP)  # noqa: E731
        got = await with_fault(pair, seed, stop, delay)
        await pair.decode.wait_released()
        same(got, await undisturbed(pair, seed))
        pair.prefill.kill(signal.SIGCONT)
        await pair.prefill.wait_released()


async def test_a_prefill_worker_that_is_not_there(pair) -> None:
    pair.prefill.kill()
    got = await ask(pair.decode, batch(pair.prefill, 40))
    await pair.decode.wait_released()
    same(got, await undisturbed(pair, 40))
    await pair.restart_prefill()


async def test_a_worker_of_another_model_is_no_error(pair, tmp_path) -> None:
    other = WorkerProcess(tmp_path, "other", ENGINE | {"dtype": "float32"}, TRANSFER)
    try:
        await other.ready()
        got = await ask(pair.decode, batch(other, 41))
        await other.wait_released()
        same(got, await undisturbed(pair, 41))
    finally:
        await other.stop()


async def test_clients_that_leave_at_any_moment(pair) -> None:
    rng = random.Random(5)
    for seed in range(50, 62):
        call = pair.decode.stub.Session(timeout=60)
        for message in batch(pair.prefill, seed):
            await call.write(worker_pb2.SessionRequest(submit=message))
        await asyncio.sleep(rng.random() * 0.3)
        if rng.random() < 0.5:
            for number in range(6):
                abort = worker_pb2.Abort(request=number)
                await call.write(worker_pb2.SessionRequest(abort=abort))
            await asyncio.sleep(0.02)
        call.cancel()
    await pair.decode.wait_released()
    await pair.prefill.wait_released()
    got = await ask(pair.decode, batch(pair.prefill, 70))
    same(got, await undisturbed(pair, 70))


async def test_deadlines_that_pass_during_a_transfer(pair) -> None:
    messages = batch(pair.prefill, 80)
    for i, message in enumerate(messages):
        message.timeout_ms = 20 + 30 * i
    await ask(pair.decode, messages)
    await pair.decode.wait_released()
    await pair.prefill.wait_released()


async def test_a_killed_decode_worker_frees_the_prefill_worker(pair) -> None:
    call = pair.decode.stub.Session(timeout=60)
    for message in batch(pair.prefill, 90):
        await call.write(worker_pb2.SessionRequest(submit=message))
    await asyncio.sleep(0.1)
    pair.decode.kill()
    await pair.prefill.wait_released()
    call.cancel()
