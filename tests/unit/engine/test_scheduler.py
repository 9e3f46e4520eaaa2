"""Scheduler: whatever is asked of the engine, every choice gets its own tokens, and every block
comes back. The fake runner draws from what the cache really holds, so lost, shared or overwritten
blocks show as wrong tokens."""

from __future__ import annotations

import random
import time

import pytest
from engines import (
    Collector,
    assert_nothing_held,
    expected_output,
    make_engine,
    make_request,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.api.errors import ApiError


def check_outputs(engine, requests, collector) -> None:
    for request in requests:
        for choice in range(request.params.n):
            assert collector.tokens[request.request_id, choice] == expected_output(
                engine, request, choice
            )


def test_prompts_longer_than_the_budget_are_computed_in_chunks() -> None:
    engine = make_engine(max_num_batched_tokens=32)
    request = make_request("a", [i % 50 for i in range(150)], max_tokens=5, ignore_eos=True)
    engine.add_request(request)
    collector = run(engine)
    check_outputs(engine, [request], collector)
    assert engine.scheduler.counters.steps == 5 + 4  # 150 tokens by 32, then the other 4 tokens


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    engine = make_engine(max_num_batched_tokens=32)
    engine.add_request(make_request("short", [1, 2], max_tokens=20, ignore_eos=True))
    engine.step()
    engine.add_request(make_request("long", list(range(40)) * 3, max_tokens=1))
    outputs = engine.step()
    assert [o.request_id for o in outputs] == ["short"]
    run(engine, _lenient())


def test_a_shared_prefix_is_computed_once() -> None:
    engine = make_engine()
    prefix = [3] * 48
    for name in "ab":
        request = make_request(name, [*prefix, ord(name) % 50], max_tokens=3, ignore_eos=True)
        engine.add_request(request)
        check_outputs(engine, [request], run(engine))
    assert engine.scheduler.counters.cache_hits == 48


@pytest.mark.parametrize(("async_scheduling", "under_way"), [(False, 16), (True, 48)])
def test_a_burst_with_one_prefix_computes_it_once_even_while_it_is_being_computed(
    async_scheduling, under_way
) -> None:
    engine = make_engine(max_num_batched_tokens=32, async_scheduling=async_scheduling)
    prefix = [i % 50 for i in range(96)]
    requests = [make_request(str(i), [*prefix, i], max_tokens=2, ignore_eos=True) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    check_outputs(engine, requests, run(engine))
    # 4 x 97 tokens asked for; the prefix once, plus what steps in flight could not yet share
    assert engine.scheduler.counters.computed_tokens < 2 * 97 + under_way
    assert_nothing_held(engine)


def test_another_tenants_salt_hides_the_prefix() -> None:
    engine = make_engine()
    for salt in (b"a", b"b"):
        engine.add_request(
            make_request(salt.decode(), [1] * 40, max_tokens=1, extra={"cache_salt": salt})
        )
        run(engine)
    assert engine.scheduler.counters.cache_hits == 0


def test_parallel_samples_share_the_prompts_blocks_and_copy_on_write() -> None:
    engine = make_engine(num_blocks=16)
    request = make_request("a", [5] * 40, n=4, max_tokens=4, ignore_eos=True)
    engine.add_request(request)
    collector = Collector()
    collector.take(engine.step())
    collector.take(engine.step())
    # 2 shared full blocks + one partial block each: 6, not 12
    assert engine.pool.counts().owned == 6
    check_outputs(engine, [request], run(engine, collector))
    assert len({tuple(collector.tokens["a", c]) for c in range(4)}) == 4
    assert_nothing_held(engine)


def test_preemption_recomputes_and_changes_nothing() -> None:
    engine = make_engine(num_blocks=16, max_model_len=128)
    requests = [
        make_request(str(i), [i + 1] * 20, max_tokens=60, ignore_eos=True) for i in range(6)
    ]
    for request in requests:
        engine.add_request(request)
    collector = run(engine)
    assert engine.scheduler.counters.preemptions > 0
    check_outputs(engine, requests, collector)
    assert_nothing_held(engine)


def test_the_oldest_request_is_never_preempted() -> None:
    engine = make_engine(num_blocks=8, max_model_len=128)
    oldest = make_request("oldest", [1] * 20, max_tokens=90, ignore_eos=True)
    engine.add_request(oldest)
    engine.step()
    for i in range(4):
        engine.add_request(make_request(str(i), [i + 2] * 20, max_tokens=90, ignore_eos=True))
    steps = 0
    while engine.scheduler.has_request("oldest"):
        assert any(o.request_id == "oldest" for o in engine.step())
        steps += 1
    assert steps == 89
    run(engine, _lenient())


def _lenient():
    class Anything(Collector):
        def take(self, outputs) -> None:
            pass

    return Anything()


def test_priority_goes_before_arrival_only_under_the_priority_policy() -> None:
    for policy, first in (("fcfs", "low"), ("priority", "high")):
        engine = make_engine(scheduling_policy=policy, max_num_seqs=1, max_num_batched_tokens=16)
        for name, priority in (("low", 5), ("high", -5)):
            engine.add_request(
                make_request(name, [1] * 4, max_tokens=1, extra={"priority": priority})
            )
        assert engine.step()[0].request_id == first
        run(engine)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_resumed_request_goes_on_at_the_same_position(async_scheduling) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    request = make_request("a", [4] * 20, n=2, max_tokens=12, ignore_eos=True)
    whole = [expected_output(engine, request, c) for c in range(2)]
    resumed = make_request(
        "a", [4] * 20, n=2, max_tokens=12, ignore_eos=True,
        extra={"resumed": {0: whole[0][:5], 1: whole[1][:7]}},
    )  # fmt: skip
    engine.add_request(resumed)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    for choice, start in ((0, 5), (1, 7)):
        mine = [o for o in outputs if o.choice == choice]
        assert [o.position for o in mine] == list(range(start, 12))
        assert [t for o in mine for t in o.token_ids] == whole[choice][start:]


def test_one_choice_can_be_ended_alone() -> None:
    engine = make_engine()
    request = make_request("a", [4] * 20, n=3, max_tokens=12, ignore_eos=True)
    engine.add_request(request)
    collector = Collector()
    for _ in range(4):
        collector.take(engine.step())
    collector.take(engine.abort("a", 1))
    run(engine, collector)
    assert collector.ended == {("a", 0): "length", ("a", 1): "abort", ("a", 2): "length"}
    assert collector.tokens["a", 2] == expected_output(engine, request, 2)
    assert_nothing_held(engine)


def test_a_resumed_request_runs_only_the_choices_that_are_left() -> None:
    engine = make_engine()
    request = make_request("a", [4] * 20, n=3, max_tokens=8, ignore_eos=True)
    want = expected_output(engine, request, 2)
    again = make_request(
        "a", [4] * 20, n=3, max_tokens=8, ignore_eos=True, extra={"resumed": {2: want[:3]}}
    )
    engine.add_request(again)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert {o.choice for o in outputs} == {2}
    assert [t for o in outputs for t in o.token_ids] == want[3:]
    assert outputs[-1].last_of_request
    assert_nothing_held(engine)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_min_tokens_keeps_a_choice_going_past_a_stop(async_scheduling) -> None:
    engine = make_engine(vocab_size=3, max_model_len=64, async_scheduling=async_scheduling)
    request = make_request("a", [1, 2], max_tokens=30, min_tokens=10)
    engine.add_request(request)
    collector = run(engine)
    assert len(collector.tokens["a", 0]) >= 10


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=16)
    past = time.monotonic() - 1
    engine.add_request(make_request("running", [1], max_tokens=100, ignore_eos=True))
    engine.step()
    engine.add_request(make_request("late", [1], max_tokens=5, extra={"deadline": past}))
    outputs = engine.step()
    late = [o for o in outputs if o.request_id == "late"]
    assert [o.finish_reason.value for o in late] == ["deadline"]
    assert late[-1].last_of_request
    run(engine, _lenient())


@pytest.mark.parametrize(
    ("options", "refused"),
    [({"max_num_queued_reqs": 2}, 2), ({"max_num_queued_tokens": 25}, 2)],
)
def test_the_queue_is_bounded_and_says_when_to_come_back(options, refused) -> None:
    engine = make_engine(**options)
    for i in range(refused):
        engine.add_request(make_request(str(i), [1] * 10))
    with pytest.raises(ApiError) as error:
        engine.add_request(make_request("x", [1] * 10))
    assert error.value.code == "overloaded"
    assert 1 <= error.value.retry_after_s <= 30
    run(engine)
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make_request("x", []), "prompt"),
        (make_request("x", [50]), "prompt"),
        (make_request("x", [-1]), "prompt"),
        (make_request("x", [1] * 256), "prompt"),
        (make_request("x", [1], n=9), "n"),
        (make_request("x", [1], stop_token_ids=[50]), "stop_token_ids"),
        (make_request("x", [1], logit_bias={50: 1.0}), "logit_bias"),
        (make_request("x", [1], allowed_token_ids=[99]), "allowed_token_ids"),
        (make_request("x", [1], extra={"resumed": {1: [2]}}), "resumed"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_by_name(request_, param) -> None:
    engine = make_engine()
    with pytest.raises(ApiError) as error:
        engine.add_request(request_)
    assert error.value.param == param
    assert error.value.status == 400
    assert_nothing_held(engine)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_prompt_logprobs_cover_every_position_once_in_any_chunking(async_scheduling) -> None:
    engine = make_engine(
        num_blocks=20, max_num_batched_tokens=24, max_num_seqs=4, max_model_len=96,
        async_scheduling=async_scheduling,
    )  # fmt: skip
    for i in range(3):
        engine.add_request(
            make_request(str(i), [7] * 50, max_tokens=20, prompt_logprobs=1, ignore_eos=True)
        )
    seen = {}
    while engine.has_work:
        for output in engine.step():
            if output.admission is not None:
                seen[output.request_id] = len(output.prompt_logprobs)
    assert seen == {"0": 49, "1": 49, "2": 49}
    assert_nothing_held(engine)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_request_without_finite_logits_fails_alone(async_scheduling) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    engine.runner.broken_seeds.add(13)
    good = make_request("good", [1] * 20, max_tokens=9, ignore_eos=True)
    engine.add_request(good)
    engine.add_request(make_request("bad", [2] * 20, seed=13, n=3, max_tokens=9))
    engine.add_request(make_request("short", [3] * 20, seed=13, max_tokens=1))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.pool.check_integrity()
    for name in ("bad", "short"):
        ended = [o for o in outputs if o.request_id == name]
        assert {o.finish_reason.value for o in ended} == {"error"}
        assert all(not o.token_ids for o in ended)
        assert ended[-1].last_of_request
    tokens = [t for o in outputs if o.request_id == "good" for t in o.token_ids]
    assert tokens == expected_output(engine, good, 0)
    assert_nothing_held(engine)


def test_waste_stays_below_four_percent_of_the_blocks_in_use() -> None:
    """Lengths as of conversations: mean 350 tokens of prompt, 180 of answer."""
    rng = random.Random(3)
    engine = make_engine(
        num_blocks=1200, max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )  # fmt: skip
    for i in range(80):
        prompt = [rng.randrange(50) for _ in range(min(int(rng.expovariate(1 / 350)) + 20, 1500))]
        max_tokens = min(int(rng.expovariate(1 / 180)) + 10, 500)
        engine.add_request(make_request(str(i), prompt, max_tokens=max_tokens, ignore_eos=True))
    wasted = used = 0
    while engine.has_work:
        engine.step()
        for seq in engine.scheduler.running.sequences:
            used += len(seq.block_table) * 16
            wasted += len(seq.block_table) * 16 - seq.num_computed
            assert len(seq.block_table) * 16 - seq.num_computed < 16
    assert wasted / used < 0.04


workload = st.lists(
    st.tuples(
        st.integers(0, 3),  # which shared prefix
        st.integers(1, 70),  # prompt length
        st.integers(1, 24),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 25),  # step at which it arrives
        st.one_of(st.none(), st.integers(0, 30)),  # step at which it is aborted
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(workload=workload, num_blocks=st.integers(7, 24), budget=st.sampled_from([4, 17, 64]))
def test_any_mix_of_arrivals_aborts_and_preemptions_gives_the_same_tokens(
    workload, num_blocks, budget
) -> None:
    engine = make_engine(
        num_blocks, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=max(budget, 4)
    )
    arrivals, aborts, requests = {}, {}, []
    for i, (prefix, length, max_tokens, n, arrival, abort) in enumerate(workload):
        prompt = [(prefix * 7 + j // 16) % 50 for j in range(length)]
        request = make_request(str(i), prompt, seed=i, n=n, max_tokens=max_tokens)
        requests.append(request)
        arrivals.setdefault(arrival, []).append(request)
        if abort is not None:
            aborts.setdefault(arrival + abort, []).append(request.request_id)
    collector = Collector()
    for step in range(5000):
        for request in arrivals.get(step, ()):
            engine.add_request(request)
        for request_id in aborts.get(step, ()):
            collector.take(engine.abort(request_id))
        if step > 60 and not engine.has_work:
            break
        collector.take(engine.step())
        engine.pool.check_integrity()
    assert_nothing_held(engine)
    for request in requests:
        for choice in range(request.params.n):
            got = collector.tokens[request.request_id, choice]
            want = expected_output(engine, request, choice)
            ended = collector.ended[request.request_id, choice]
            assert got == (want[: len(got)] if ended == "abort" else want)
