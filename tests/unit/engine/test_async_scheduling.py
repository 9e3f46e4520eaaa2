"""The next step planned while one runs: the same tokens, nothing lost, nothing given away early.

The fake runner computes a step only when it is waited for, so whatever happened since it was
planned (requests that ended, blocks that went elsewhere) has happened before it runs.
"""

from __future__ import annotations

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

from quire.api import block_hash
from quire.engine.runner.fake import EMPTY
from quire.engine.scheduler.handover import Link


def make_ahead(*args, **options):
    return make_engine(*args, async_scheduling=True, **options)


def check(engine, request, collector) -> None:
    for choice in range(request.params.n):
        want = expected_output(engine, request, choice)
        assert collector.tokens[request.request_id, choice] == want


def test_a_step_is_launched_before_the_one_before_it_is_waited_for() -> None:
    engine = make_ahead()
    request = make_request("a", [1, 2, 3], max_tokens=4, ignore_eos=True)
    engine.add_request(request)
    collector = Collector()
    assert engine.step() == []
    under_way = []
    while engine.has_work:
        collector.take(engine.step())
        under_way.append(len(engine.scheduler.flight))
    assert under_way == [1, 1, 1, 0], "the last token is known to be the last before it is known"
    check(engine, request, collector)
    assert engine.scheduler.counters.computed_tokens == 3 + 3
    assert_nothing_held(engine)


def test_what_a_step_computes_for_a_sequence_that_has_stopped_is_dropped() -> None:
    engine = make_ahead(vocab_size=5)
    requests = [make_request(str(i), [1, 2, i], seed=i, max_tokens=200) for i in range(5)]
    for request in requests:
        engine.add_request(request)
    collector = run(engine)
    for request in requests:
        check(engine, request, collector)
        assert collector.ended[request.request_id, 0] == "stop"
    given = engine.scheduler.counters.generated_tokens
    assert given == sum(len(tokens) for tokens in collector.tokens.values())
    # one token each, and no more, was computed beyond its end
    assert engine.scheduler.counters.computed_tokens == 5 * 3 + given - 5 + 5
    assert_nothing_held(engine)


def test_blocks_of_a_stopped_sequence_stay_held_while_a_step_may_write_them() -> None:
    engine = make_ahead()
    engine.add_request(make_request("a", [5] * 20, max_tokens=50, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert engine.abort("a")[-1].last_of_request
    assert engine.pool.counts().owned == 2
    assert engine.has_work, "a step is under way"
    assert engine.step() == []
    assert not engine.has_work
    assert_nothing_held(engine)


def test_an_engine_that_has_nothing_to_plan_lands_what_is_under_way() -> None:
    engine = make_ahead()
    engine.add_request(make_request("a", [5], max_tokens=1))
    assert engine.step() == []
    [output] = engine.step()
    assert output.last_of_request
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"bad_words_ids": ((3, 4),)}],
)
def test_a_draw_by_history_waits_for_the_history(params) -> None:
    """Its edits name every token so far; the others of its steps wait with it."""
    engine = make_ahead()
    requests = [
        make_request("a", [1, 2], max_tokens=6, ignore_eos=True, **params),
        make_request("b", [1, 2], max_tokens=12, ignore_eos=True),
    ]
    histories = []
    launch = engine.runner.launch

    def listen(plan):
        if (edits := plan.sampling.edits) is not None:
            histories.append(edits.history[: edits.history_start[1]].tolist())
        return launch(plan)

    engine.runner.launch = listen
    for request in requests:
        engine.add_request(request)
    collector = run(engine)
    for request in requests:
        check(engine, request, collector)
    if "bad_words_ids" not in params:
        output = expected_output(engine, requests[0], 0)
        assert histories == [[1, 2, *output[:i]] for i in range(6)]


def test_choices_fork_off_before_anything_goes_on() -> None:
    engine = make_ahead(num_blocks=16)
    request = make_request("a", [5] * 40, n=4, max_tokens=4, ignore_eos=True)
    engine.add_request(request)
    collector = Collector()
    while not collector.tokens:
        collector.take(engine.step())
    assert len(engine.scheduler.flight) == 0
    check(engine, request, run(engine, collector))
    assert_nothing_held(engine)


def test_nobody_is_preempted_while_a_step_is_under_way() -> None:
    engine = make_ahead(num_blocks=16, max_model_len=128)
    requests = [
        make_request(str(i), [i + 1] * 20, max_tokens=60, ignore_eos=True) for i in range(6)
    ]
    preempt = engine.scheduler._preempt

    def watched(seq):
        assert len(engine.scheduler.flight) == 0
        preempt(seq)

    engine.scheduler._preempt = watched
    for request in requests:
        engine.add_request(request)
    collector = run(engine)
    assert engine.scheduler.counters.preemptions > 0
    for request in requests:
        check(engine, request, collector)
    assert_nothing_held(engine)


def test_a_request_that_moves_leaves_only_blocks_that_are_computed() -> None:
    engine = make_ahead()
    engine.add_request(make_request("a", list(range(40)), max_tokens=30, ignore_eos=True))
    while engine.scheduler.counters.generated_tokens < 8:
        engine.step()
    # token 47 is drawn and its step under way: 48 tokens would be three blocks
    [seq] = engine.scheduler.running.sequences
    assert seq.num_computed == 48
    assert seq.num_registered == 2
    engine.scheduler.park("a", "parked")
    engine.abort("a")
    run(engine)
    assert engine.pool.counts().owned == 2
    engine.scheduler.handover.release("parked")
    assert_nothing_held(engine)


def check_registered(engine) -> None:
    """What others may find and fetch is computed."""
    for seq in engine.scheduler.running.sequences:
        blocks = engine.runner.slots[seq.block_table[: seq.num_registered]]
        assert blocks.reshape(-1).tolist() == seq.tokens[: seq.num_registered * 16]


def test_blocks_that_others_finish_are_taken_over_beside_a_chunk_under_way() -> None:
    engine = make_ahead(max_num_batched_tokens=64)
    prompt = [i % 50 for i in range(150)]
    requests = [make_request(name, [*prompt, i], max_tokens=4) for i, name in enumerate("ab")]
    for request in requests:
        engine.add_request(request)
    collector = Collector()
    while engine.has_work:
        collector.take(engine.step())
        engine.pool.check_integrity()
        check_registered(engine)
        if len(collector.tokens) == 2 and not collector.ended:
            # 9 full blocks once, however they came about, and the last one of each
            assert engine.pool.counts().owned == 9 + 2
    for request in requests:
        check(engine, request, collector)
    assert engine.scheduler.counters.cache_hits > 0
    assert_nothing_held(engine)


workload = st.lists(
    st.fixed_dictionaries(
        {
            "prefix": st.integers(0, 3),
            "length": st.integers(1, 70),
            "max_tokens": st.integers(1, 24),
            "n": st.integers(1, 3),
            "penalty": st.sampled_from([0.0, 0.0, 0.0, 0.5]),
            "ignore_eos": st.booleans(),
            "arrival": st.integers(0, 25),
            "abort": st.one_of(st.none(), st.integers(0, 30)),
        }
    ),
    min_size=1,
    max_size=10,
)


class Receiver:
    """Another pod's blocks arrive: taken, written beside all steps, and later found unharmed."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.held: dict[str, list[int]] = {}

    def take(self, step: int, count: int) -> None:
        key = f"transfer {step}"
        links = [
            Link(block_hash.root(f"{key} {i}".encode(), salt=b""), b"parent") for i in range(count)
        ]
        granted = self.engine.scheduler.handover.prepare(key, links)
        self.held[key] = [block for _, block in granted]
        self.engine.runner.slots[self.held[key]] = step

    def release(self, step: int) -> None:
        key = f"transfer {step}"
        if key in self.held:
            blocks = self.held.pop(key)
            assert (self.engine.runner.slots[blocks] == step).all(), "a step wrote a block it lost"
            self.engine.runner.slots[blocks] = EMPTY
            self.engine.scheduler.handover.release(key)


@settings(max_examples=200, deadline=None)
@given(
    workload=workload,
    num_blocks=st.integers(7, 24),
    budget=st.sampled_from([4, 17, 64]),
    transfers=st.dictionaries(st.integers(0, 40), st.integers(1, 3), max_size=6),
)
def test_any_mix_of_requests_and_transfers_gives_the_same_tokens(
    workload, num_blocks, budget, transfers
) -> None:
    engine = make_ahead(
        num_blocks, vocab_size=20, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=budget
    )
    requests, arrivals, aborts = [], {}, {}
    for i, one in enumerate(workload):
        request = make_request(
            str(i), [(one["prefix"] * 7 + j // 16) % 20 for j in range(one["length"])], seed=i,
            n=one["n"], max_tokens=one["max_tokens"], presence_penalty=one["penalty"],
            ignore_eos=one["ignore_eos"],
        )  # fmt: skip
        requests.append(request)
        arrivals.setdefault(one["arrival"], []).append(request)
        if one["abort"] is not None:
            aborts.setdefault(one["arrival"] + one["abort"], []).append(request.request_id)
    collector, receiver = Collector(), Receiver(engine)
    for step in range(5000):
        for request in arrivals.get(step, ()):
            engine.add_request(request)
        for request_id in aborts.get(step, ()):
            collector.take(engine.abort(request_id))
        if step in transfers:
            receiver.take(step, transfers[step])
        receiver.release(step - 3)
        if step > 60 and not engine.has_work:
            break
        collector.take(engine.step())
        engine.pool.check_integrity()
        assert len(engine.scheduler.flight) <= 1
        check_registered(engine)
    assert_nothing_held(engine)
    for request in requests:
        for choice in range(request.params.n):
            want = expected_output(engine, request, choice)
            got = collector.tokens[request.request_id, choice]
            ended = collector.ended[request.request_id, choice]
            assert got == (want[: len(got)] if ended == "abort" else want)
