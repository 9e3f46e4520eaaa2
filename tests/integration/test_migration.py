"""A request that moves to another worker takes its KV blocks along: same tokens, nothing computed
twice but a block, and no block kept on either side. The test plays the gateway."""

from __future__ import annotations

import asyncio
import signal

import grpc
import pytest
import pytest_asyncio
from test_disaggregated import ENGINE, FEATURES, prompt, submit
from workers import Answer, WorkerProcess, ask

from quire.proto import worker_pb2

# Slow enough that a request is still running when it is moved.
TRANSFER = {"kv_transports": ["tcp"], "kv_heartbeat_s": 5.0, "kv_lease_s": 30.0}
LENGTH = 300
MOVABLE = sorted(FEATURES.keys() - {"one_token", "stop_ids"})


class Mover:
    """One request on one worker and then on another, as a gateway sends it."""

    def __init__(self, message: worker_pb2.Submit) -> None:
        self.submit = message
        self.answer = Answer()

    async def run(self, worker: WorkerProcess, until: int | None = None) -> None:
        """On a worker, until so many tokens of each choice are there; then it is moved away."""
        call = worker.stub.Session(timeout=60)
        try:
            await call.write(worker_pb2.SessionRequest(submit=self.submit))
            while not self._is_enough(until):
                reply = await call.read()
                assert reply is not grpc.aio.EOF, "the session ended"
                assert not reply.HasField("failure"), reply.failure.message
                for output in reply.batch.outputs:
                    self.answer.take(output)
            if until is not None:
                abort = worker_pb2.Abort(request=self.submit.request, moved=True)
                await call.write(worker_pb2.SessionRequest(abort=abort))
                await asyncio.sleep(0.05)  # the abort is read before the session ends
        finally:
            call.cancel()

    def resume(self, source: WorkerProcess) -> None:
        """The next attempt, behind the tokens that are there."""
        self.submit.attempt += 1
        self.submit.source.worker, self.submit.source.address = source.name, source.address
        del self.submit.resumed[:]
        for choice in range(self.submit.sampling.n):
            if choice not in self.answer.ended:
                tokens = self.answer.tokens[choice]
                self.submit.resumed.add(choice=choice, token_ids=tokens)

    def _is_enough(self, until: int | None) -> bool:
        choices = range(self.submit.sampling.n)
        if until is None:
            return len(self.answer.ended) == len(choices)
        return all(len(self.answer.tokens.get(c, ())) >= until for c in choices)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    pair = [WorkerProcess(folder, name, ENGINE, TRANSFER) for name in ("left", "right")]
    try:
        await asyncio.gather(*(worker.ready() for worker in pair))
        yield pair
    finally:
        await asyncio.gather(*(worker.stop() for worker in pair))


async def forget(*workers: WorkerProcess) -> None:
    reset = worker_pb2.ControlRequest(reset_prefix_cache=worker_pb2.ResetPrefixCache())
    for worker in workers:
        assert (await worker.stub.Control(reset, timeout=10)).ok


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("feature", MOVABLE)
@pytest.mark.parametrize("until", [1, 40])
async def test_tokens_are_those_of_a_request_that_stayed(pair, feature, until) -> None:
    left, right = pair
    sampling = {"max_tokens": 160, "ignore_eos": True} | FEATURES[feature]
    ids = prompt(7, LENGTH)
    [want] = await ask(right, [submit(1, ids, **sampling)])
    await forget(left, right)
    moved, recomputed, blocks = [
        await right.metric(name)
        for name in (
            'quire_migrated_sequences_total{engine="0",how="kv"',
            'quire_migrated_sequences_total{engine="0",how="recompute"',
            "quire_migrated_blocks_total",
        )
    ]
    computed = await right.metric("quire_step_tokens_sum")

    mover = Mover(submit(2, ids, **sampling))
    await mover.run(left, until)
    mover.resume(left)
    had = [len(tokens) for tokens in mover.answer.tokens.values()]
    await mover.run(right)

    assert mover.answer.tokens == want.tokens
    assert mover.answer.logprobs == want.logprobs
    assert mover.answer.ended == want.ended
    n = sampling.get("n", 1)
    name = 'quire_migrated_sequences_total{engine="0",how="kv"'
    assert await right.metric(name) == moved + n
    name = 'quire_migrated_sequences_total{engine="0",how="recompute"'
    assert await right.metric(name) == recomputed
    shared = LENGTH // 16
    tails = sum((LENGTH + count - 1) // 16 - shared for count in had)
    assert await right.metric("quire_migrated_blocks_total") == blocks + shared + tails
    rest = sum(160 - count for count in had)
    again = await right.metric("quire_step_tokens_sum") - computed - rest
    assert again <= 16 * n, "more than the last block of a choice was computed twice"
    await asyncio.gather(left.wait_released(), right.wait_released())


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("what", ["unknown address", "no blocks"])
async def test_without_blocks_everything_is_computed_again(pair, what) -> None:
    left, right = pair
    sampling = {"max_tokens": 60, "temperature": 0.9, "seed": 5, "ignore_eos": True}
    ids = prompt(11, LENGTH)
    [want] = await ask(right, [submit(1, ids, **sampling)])
    await forget(left, right)
    mover = Mover(submit(3, ids, **sampling))
    await mover.run(left, 20)
    mover.resume(left)
    if what == "no blocks":
        await left.wait_released()
        await forget(left)
    else:
        mover.submit.source.address = "unix:/nowhere/at.all"
    name = 'quire_migrated_sequences_total{engine="0",how="recompute"'
    before = await right.metric(name)
    await mover.run(right)
    assert mover.answer.tokens == want.tokens
    assert await right.metric(name) == before + 1
    await asyncio.gather(left.wait_released(), right.wait_released())


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_aborted_on_its_way_in_leaves_nothing(pair) -> None:
    left, right = pair
    for delay in (0.0, 0.002, 0.01, 0.05):
        mover = Mover(submit(4, prompt(13, 700), max_tokens=200, ignore_eos=True))
        await mover.run(left, 5)
        mover.resume(left)
        call = right.stub.Session(timeout=60)
        await call.write(worker_pb2.SessionRequest(submit=mover.submit))
        await asyncio.sleep(delay)
        call.cancel()
        await asyncio.gather(left.wait_released(), right.wait_released())
        await forget(left, right)


async def drain(worker: WorkerProcess, timeout_ms: int = 20_000) -> None:
    request = worker_pb2.ControlRequest(drain=worker_pb2.Drain(timeout_ms=timeout_ms))
    assert (await worker.stub.Control(request, timeout=10)).ok


async def test_a_worker_that_drains_gives_its_blocks_refuses_requests_and_ends(tmp_path) -> None:
    left, right = (WorkerProcess(tmp_path, name, ENGINE, TRANSFER) for name in ("left", "right"))
    try:
        await asyncio.gather(left.ready(), right.ready())
        sampling = {"max_tokens": 400, "temperature": 0.9, "seed": 5, "ignore_eos": True}
        movers = [Mover(submit(i, prompt(i, LENGTH), **sampling)) for i in (1, 2, 3)]
        wants = await ask(right, [submit(i, prompt(i, LENGTH), **sampling) for i in (1, 2, 3)])
        await forget(right)
        running = [asyncio.create_task(mover.run(left, 60)) for mover in movers]
        await asyncio.sleep(0.2)
        await drain(left)
        [refused] = await ask(left, [submit(9, [1, 2, 3])])
        assert refused.failure.code == worker_pb2.Failure.CODE_NOT_READY
        load = await left.load()
        assert load.draining
        assert load.decode_weight == 1.0
        await asyncio.gather(*running)
        assert left.process.poll() is None, "it ended before its blocks were fetched"
        for mover in movers:
            mover.resume(left)
        await asyncio.gather(*(mover.run(right) for mover in movers))
        assert [m.answer.tokens for m in movers] == [want.tokens for want in wants]
        assert await asyncio.to_thread(left.process.wait, 15) == 0
        assert await right.metric("quire_migrated_blocks_total") >= 3 * (LENGTH // 16)
        await right.wait_released()
    finally:
        await asyncio.gather(left.stop(), right.stop())


async def test_signals(tmp_path) -> None:
    """SIGTERM drains: with nothing to do it ends at once. A second one does not wait."""
    idle, busy = (WorkerProcess(tmp_path, name, ENGINE) for name in ("idle", "busy"))
    try:
        await asyncio.gather(idle.ready(), busy.ready())
        idle.kill(signal.SIGTERM)
        assert await asyncio.to_thread(idle.process.wait, 15) == 0
        mover = Mover(submit(1, [1, 2, 3], n=8, max_tokens=1000, ignore_eos=True))
        running = asyncio.create_task(mover.run(busy))
        await asyncio.sleep(0.3)
        busy.kill(signal.SIGTERM)
        await asyncio.sleep(0.8)
        assert busy.process.poll() is None
        busy.kill(signal.SIGTERM)
        assert await asyncio.to_thread(busy.process.wait, 15) == 0
        await asyncio.gather(running, return_exceptions=True)
    finally:
        await asyncio.gather(idle.stop(), busy.stop())
