"""Step plans: one that goes on from the step before is what would be built from nothing."""

from __future__ import annotations

import numpy as np
import pytest
from engines import make_engine, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.scheduler.batch import _Builder


def same(one, other) -> bool:
    """Equal all the way down, arrays by type and content."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f), getattr(other, f)) for f in one.__dataclass_fields__)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Watch:
    """Compares every plan of an engine with one that is built from nothing."""

    def __init__(self, engine, monkeypatch) -> None:
        self.went_on = 0
        seats = engine.scheduler.running.seats
        build = seats.build

        def checked(step, decodes, chunks, copies):
            before = seats._last
            built = _Builder(seats, decodes, chunks).build(step, copies)
            plan = build(step, decodes, chunks, copies)
            assert same(plan, built)
            self.went_on += (
                before is not None and plan.plan.sampling.rows is before.plan.sampling.rows
            )
            return plan

        monkeypatch.setattr(seats, "build", checked)


def drive(engine, arrivals: dict[int, list], aborts: dict[int, list[str]]) -> None:
    for step in range(2000):
        for request in arrivals.get(step, ()):
            engine.add_request(request)
        for request_id in aborts.get(step, ()):
            engine.abort(request_id)
        if step > 40 and not engine.has_work:
            return
        engine.step()
    raise AssertionError("it does not end")


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_decodes_alone_go_on_from_step_to_step(monkeypatch, async_scheduling) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    requests = [
        make_request(str(i), [i + 1] * 20, max_tokens=30, ignore_eos=True) for i in range(3)
    ]
    watch = Watch(engine, monkeypatch)
    drive(engine, {0: requests}, {})
    assert watch.went_on >= 26  # all but the prompts' step and the first after it


@settings(max_examples=100, deadline=None)
@given(
    workload=st.lists(
        st.fixed_dictionaries(
            {
                "prefix": st.integers(0, 2),
                "length": st.integers(1, 60),
                "max_tokens": st.integers(1, 40),
                "n": st.sampled_from([1, 1, 1, 2]),
                "params": st.sampled_from(
                    [{}, {}, {}, {"presence_penalty": 0.5}, {"logprobs": 2}, {"prompt_logprobs": 1}]
                ),
                "arrival": st.integers(0, 25),
                "abort": st.one_of(st.none(), st.integers(0, 30)),
            }
        ),
        min_size=1,
        max_size=8,
    ),
    num_blocks=st.integers(7, 24),
    async_scheduling=st.booleans(),
)
def test_a_plan_that_goes_on_is_what_would_be_built(workload, num_blocks, async_scheduling) -> None:
    engine = make_engine(
        num_blocks, max_model_len=100, max_num_seqs=4, async_scheduling=async_scheduling
    )
    arrivals, aborts = {}, {}
    for i, one in enumerate(workload):
        prompt = [(one["prefix"] * 7 + j // 16) % 50 for j in range(one["length"])]
        request = make_request(
            str(i), prompt, seed=i, n=one["n"], max_tokens=one["max_tokens"], **one["params"]
        )
        arrivals.setdefault(one["arrival"], []).append(request)
        if one["abort"] is not None:
            aborts.setdefault(one["arrival"] + one["abort"], []).append(str(i))
    with pytest.MonkeyPatch.context() as monkeypatch:
        Watch(engine, monkeypatch)
        drive(engine, arrivals, aborts)
