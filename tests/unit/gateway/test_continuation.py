"""A request goes on elsewhere whenever its worker is lost, with each token exactly once."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import pytest

from quire.api.errors import ApiError
from quire.gateway.continuation import Patience
from quire.gateway.fake_worker import FakeWorker, speak
from quire.gateway.worker import Loss
from quire.gateway.workers import Workers
from quire.proto import common_pb2, worker_pb2

TOKENS = list(range(100, 112))
LENGTH = common_pb2.FINISH_REASON_LENGTH
FAILURE = worker_pb2.Failure
OUT = worker_pb2.ChoiceOutput


def request(n=1, **fields):
    submit = worker_pb2.Submit(prompt_token_ids=[1, 2, 3], request_id="r", **fields)
    submit.sampling.n, submit.sampling.max_tokens, submit.sampling.seed = n, len(TOKENS), 7
    return submit


@asynccontextmanager
async def running(*scripts, patience=None, ready=None):
    """Workers that play scripts, and the losses after which requests went on."""
    model = worker_pb2.ModelInfo(model="m", fingerprint=b"f")
    fakes = [FakeWorker(model, script, name=str(i)) for i, script in enumerate(scripts)]
    for fake in fakes[ready or len(fakes) :]:
        fake.ready = False
    losses: list[Loss] = []
    workers = Workers(
        fakes, patience or Patience(wait_s=2.0), on_resubmission=lambda loss, _: losses.append(loss)
    )
    running = asyncio.create_task(workers.run())
    try:
        yield workers, fakes, losses
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not workers._tasks
        assert [fake.num_open for fake in fakes] == [0] * len(fakes)


async def sent_to(worker):
    """Until the worker has a request."""
    async with asyncio.timeout(5):
        while not worker.submitted:
            await asyncio.sleep(0)


async def read(workers, *submits):
    """Token ids and finish reason of each choice of each request."""
    got = [{c: [] for c in range(s.sampling.n)} for s in submits]
    ends: list[dict[int, int]] = [{} for _ in submits]
    async with workers.submit(submits) as replies, asyncio.timeout(5):
        while any(len(e) < len(g) for e, g in zip(ends, got, strict=True)):
            for index, output in await replies.next():
                assert output.position == len(got[index][output.choice])
                assert output.choice not in ends[index]
                got[index][output.choice] += output.token_ids
                if output.finish_reason:
                    ends[index][output.choice] = output.finish_reason
    return got, ends


def lost_after(count, fakes, loss=Loss.LOST, back_after=None):
    """A script: the worker that plays it is lost once, when it has said `count` outputs."""

    async def script(submit):
        said = 0
        async for output in speak(TOKENS)(submit):
            if said == count and submit.attempt == 0:
                worker = next(f for f in fakes() if submit in f.submitted)
                worker.stop(loss)
                if back_after is not None:
                    await asyncio.sleep(back_after)
                    worker.start()
                return
            said += 1
            yield output

    return script


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("count", range(len(TOKENS)))
async def test_a_worker_lost_at_any_moment_is_made_up_for(count, n):
    fakes: list[FakeWorker] = []
    script = lost_after(count, lambda: fakes)
    async with running(script, script) as (workers, made, losses):
        fakes += made
        got, ends = await read(workers, request(n))
        assert got == [dict.fromkeys(range(n), TOKENS)]
        assert ends == [dict.fromkeys(range(n), LENGTH)]
        assert losses == [Loss.LOST]
        [again] = [s for f in made for s in f.submitted if s.attempt == 1]
        assert again.sampling.seed == 7
        assert sum(len(r.token_ids) for r in again.resumed) == count


@pytest.mark.parametrize("count", [0, 5])
async def test_the_only_worker_is_waited_for(count):
    fakes: list[FakeWorker] = []
    script = lost_after(count, lambda: fakes)
    async with running(script) as (workers, made, losses):
        fakes += made
        reading = asyncio.create_task(read(workers, request()))
        await asyncio.sleep(0.05)
        assert not made[0].ready
        made[0].start()
        got, _ = await reading
        assert got == [{0: TOKENS}]
        assert losses == [Loss.LOST]


async def test_every_prompt_goes_on_for_itself():
    fakes: list[FakeWorker] = []
    script = lost_after(4, lambda: fakes)
    async with running(script, speak(TOKENS, delay_s=0.001)) as (workers, made, losses):
        fakes += made
        got, _ = await read(workers, *(request() for _ in range(4)))
        assert got == [{0: TOKENS}] * 4
        assert set(losses) == {Loss.LOST}


async def test_losses_in_a_row_at_random_moments():
    rng = random.Random(3)
    slow = speak(TOKENS, delay_s=0.002)
    for _ in range(10):
        async with running(slow, slow, slow, patience=Patience(5, 2.0)) as (workers, made, _):
            reading = asyncio.create_task(read(workers, request(2), request()))
            for _ in range(4):
                await asyncio.sleep(rng.random() * 0.008)
                victim = rng.choice(made)
                victim.stop(rng.choice([Loss.LOST, Loss.SILENT, Loss.HUNG]))
                if rng.random() < 0.5:
                    await asyncio.sleep(rng.random() * 0.004)
                victim.start()
            got, _ = await reading
            assert got == [{0: TOKENS, 1: TOKENS}, {0: TOKENS}]


async def test_loss_after_the_last_token_before_its_end_was_said():
    """Only the word that it is over was lost: nothing is asked of another worker."""

    async def script(submit):
        yield OUT(token_ids=TOKENS)
        made[0].stop()

    async with running(script, script, ready=1) as (workers, made, losses):
        got, ends = await read(workers, request())
        assert (got, ends, losses) == ([{0: TOKENS}], [{0: LENGTH}], [])


async def test_choices_that_have_ended_stay_ended():
    async def first(submit):
        yield OUT(choice=1, token_ids=[5], finish_reason=common_pb2.FINISH_REASON_STOP)
        yield OUT(choice=0, token_ids=[6])
        made[0].stop()

    async def second(submit):
        assert {r.choice: list(r.token_ids) for r in submit.resumed} == {0: [6], 2: []}
        for choice, position in ((2, 0), (0, 1)):
            yield OUT(
                attempt=1, choice=choice, position=position, token_ids=[7], finish_reason=LENGTH
            )

    async with running(first, second, ready=1) as (workers, made, _):
        reading = asyncio.create_task(read(workers, request(3)))
        await asyncio.sleep(0.02)
        made[1].start()
        got, _ = await reading
        assert got == [{0: [6, 7], 1: [5], 2: [7]}]


async def test_late_words_of_an_earlier_attempt_are_dropped():
    async def first(submit):
        yield OUT(token_ids=[5])
        await asyncio.sleep(30)

    async with running(first, speak([5, 6, 7])) as (workers, made, _):
        made[1].ready = False
        async with workers.submit([request()]) as replies:
            assert [o.token_ids[0] for _, o in await replies.next()] == [5]
            late = made[0]._receivers[1]
            made[1].start()
            made[0].stop()
            late.deliver(OUT(position=1, token_ids=[99]))
            late.lose(Loss.LOST)
            late.refuse(FAILURE(code=FAILURE.CODE_INVALID))
            tokens = []
            async with asyncio.timeout(5):
                while len(tokens) < 2:
                    tokens += [t for _, o in await replies.next() for t in o.token_ids]
            assert tokens == [6, 7]


@pytest.mark.parametrize("position", [3, 9])
async def test_a_gap_is_asked_for_again_and_the_worker_told(position):
    async def gap(submit):
        yield OUT(token_ids=TOKENS[:2])
        yield OUT(position=position, token_ids=[9])
        await asyncio.sleep(30)

    async with running(gap, speak(TOKENS), ready=1) as (workers, made, losses):
        reading = asyncio.create_task(read(workers, request()))
        await sent_to(made[0])
        made[1].ready = True
        got, _ = await reading
        assert got == [{0: TOKENS}]
        assert losses == [Loss.GAP]
        assert made[0].aborted == [1]


async def test_a_choice_ended_by_the_worker_unasked_goes_on():
    async def script(submit):
        if submit.attempt == 0:
            yield OUT(token_ids=TOKENS[:2], finish_reason=common_pb2.FINISH_REASON_ABORT)
            await asyncio.sleep(30)
        async for output in speak(TOKENS)(submit):
            yield output

    async with running(script) as (workers, _, losses):
        got, _ = await read(workers, request())
        assert got == [{0: TOKENS}]
        assert losses == [Loss.ABORTED]


@pytest.mark.parametrize("code", [FAILURE.CODE_NOT_READY, FAILURE.CODE_OVERLOADED,
                                  FAILURE.CODE_INTERNAL])  # fmt: skip
@pytest.mark.parametrize("count", [0, 3])
async def test_what_one_refuses_another_does(code, count):
    async def refuse(submit):
        for position in range(count):
            yield OUT(position=position, token_ids=[TOKENS[position]])
        yield FAILURE(code=code)

    async with running(refuse, speak(TOKENS), ready=1) as (workers, made, losses):
        reading = asyncio.create_task(read(workers, request()))
        await sent_to(made[0])
        made[1].ready = True
        got, _ = await reading
        assert got == [{0: TOKENS}]
        assert len(losses) == 1


async def test_a_request_that_fails_everywhere_fails_after_a_few_times():
    async def refuse(submit):
        yield FAILURE(code=FAILURE.CODE_INTERNAL, message="secret")

    async with running(refuse, refuse) as (workers, made, losses):
        with pytest.raises(ApiError) as caught:
            await read(workers, request())
        assert caught.value.code == "internal_error"
        assert losses == [Loss.INTERNAL] * 3
        assert sum(len(f.submitted) for f in made) == 4


async def test_a_token_in_between_makes_patience_new():
    async def one_token(submit):
        position = len(submit.resumed[0].token_ids) if submit.resumed else 0
        end = LENGTH if position == len(TOKENS) - 1 else 0
        yield OUT(
            attempt=submit.attempt, position=position, token_ids=[TOKENS[position]],
            finish_reason=end,
        )  # fmt: skip
        if not end:
            yield FAILURE(code=FAILURE.CODE_INTERNAL)

    async with running(one_token, one_token) as (workers, _, losses):
        got, _ = await read(workers, request())
        assert got == [{0: TOKENS}]
        assert len(losses) == len(TOKENS) - 1


async def test_nobody_comes_back_in_time():
    fakes: list[FakeWorker] = []
    script = lost_after(3, lambda: fakes)
    async with running(script, patience=Patience(wait_s=0.05)) as (workers, made, _):
        fakes += made
        with pytest.raises(ApiError, match="was lost"):
            await read(workers, request())


async def test_the_deadline_counts_while_waiting():
    fakes: list[FakeWorker] = []
    script = lost_after(3, lambda: fakes)
    async with running(script) as (workers, made, _):
        fakes += made
        with pytest.raises(ApiError) as caught:
            await read(workers, request(timeout_ms=50))
        assert caught.value.code == "deadline_exceeded"


async def test_a_client_that_leaves_while_its_request_waits_leaves_nothing():
    fakes: list[FakeWorker] = []
    script = lost_after(3, lambda: fakes)
    async with running(script) as (workers, made, _):
        fakes += made
        async with workers.submit([request()]) as replies:
            await replies.next()
            await asyncio.sleep(0.01)
            assert len(workers._tasks) == 1
        async with asyncio.timeout(5):
            while workers._tasks:
                await asyncio.sleep(0)


async def test_a_draining_worker_hands_its_requests_over():
    slow = speak(TOKENS, delay_s=0.005)
    async with running(slow, slow, ready=1) as (workers, made, losses):
        reading = asyncio.create_task(read(workers, request()))
        await asyncio.sleep(0.02)
        made[0].load.draining = True
        made[0].ready = False
        made[0].on_change()
        await asyncio.sleep(0.01)
        assert made[0].num_open == 1, "there is nobody to take it yet"
        made[1].start()
        got, _ = await reading
        assert got == [{0: TOKENS}]
        assert losses == [Loss.DRAINING]


async def test_only_the_same_model_can_go_on():
    fakes: list[FakeWorker] = []
    script = lost_after(3, lambda: fakes)
    async with running(script, script, patience=Patience(wait_s=0.05)) as (workers, made, _):
        fakes += made
        made[1].ready = False
        reading = asyncio.create_task(read(workers, request()))
        await sent_to(made[0])
        made[1].model = worker_pb2.ModelInfo(model="m", fingerprint=b"other")
        made[1].ready = True
        with pytest.raises(ApiError, match="was lost"):
            await reading


KINDS = ("amx", "avx512", "amx")


def with_kinds(workers, made):
    """Give each a kind of kernels; (loss, whether its kind stayed the same) of what goes on."""
    for fake, numerics in zip(made, KINDS, strict=False):
        fake.model = worker_pb2.ModelInfo(model="m", fingerprint=b"f", numerics=numerics)
    noted = []
    workers.resubmitted = lambda loss, same_bits: noted.append((loss, same_bits))
    return noted


@pytest.mark.parametrize("is_alike_ready", [True, False])
async def test_a_request_goes_on_with_the_kernels_it_began_with_if_it_can(is_alike_ready, caplog):
    fakes: list[FakeWorker] = []
    first = lost_after(3, lambda: fakes)
    async with running(first, speak(TOKENS), speak(TOKENS), ready=1) as (workers, made, _):
        fakes += made
        noted = with_kinds(workers, made)
        reading = asyncio.create_task(read(workers, request()))
        await sent_to(made[0])
        made[1].ready, made[2].ready, made[2].load.running = True, is_alike_ready, 50
        assert (await reading)[0] == [{0: TOKENS}]
        assert [len(fake.submitted) for fake in made[1:]] == ([0, 1] if is_alike_ready else [1, 0])
        assert noted == [(Loss.LOST, is_alike_ready)]
        assert ("round otherwise than amx" in caplog.text) != is_alike_ready


async def test_kernels_do_not_matter_before_the_first_token():
    fakes: list[FakeWorker] = []
    async with running(lost_after(0, lambda: fakes), speak(TOKENS), ready=1) as (workers, made, _):
        fakes += made
        noted = with_kinds(workers, made)
        reading = asyncio.create_task(read(workers, request()))
        await sent_to(made[0])
        made[1].ready = True
        assert (await reading)[0] == [{0: TOKENS}]
        assert noted == [(Loss.LOST, True)]


async def test_requests_go_where_there_are_fewest():
    slow = speak(TOKENS, delay_s=0.005)
    async with running(slow, slow) as (workers, made, _):
        await read(workers, *(request() for _ in range(6)))
        assert [len(f.submitted) for f in made] == [3, 3]


async def test_what_a_draining_worker_has_is_fetched_by_the_next_one():
    """The worker that a request leaves in good order is named as the source of its blocks, to every
    worker that is asked until one goes on; one that was lost is named to nobody."""

    async def first(submit):
        if submit.attempt:
            async for output in speak(TOKENS)(submit):
                yield output
            return
        yield OUT(token_ids=TOKENS[:3])
        made[1].ready = True
        made[0].stop(Loss.DRAINING)

    async def second(submit):
        if submit.attempt == 1:
            yield FAILURE(code=FAILURE.CODE_NOT_READY, message="later")
            return
        yield OUT(attempt=submit.attempt, position=3, token_ids=TOKENS[3:5])
        made[0].start()
        made[1].stop(Loss.LOST)

    async with running(first, second, ready=1) as (workers, made, losses):
        got, _ = await read(workers, request())
        assert got == [{0: TOKENS}]
        assert losses == [Loss.DRAINING, Loss.NOT_READY, Loss.LOST]
        assert [s.source.address for s in made[1].submitted] == ["fake:0", "fake:0"]
        assert [s.HasField("source") for s in made[0].submitted] == [False, False]
