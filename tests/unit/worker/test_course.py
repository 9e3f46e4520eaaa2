"""The time of a prompt that another worker computed, in parts that sum to the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.proto.worker_pb2 import FirstTokens
from quire.worker.roles.course import MAX_ARRIVALS, Course

seconds = st.floats(0, 100)


def parts_of(times):
    return (
        times.ask_s, times.queue_s, times.prefill_s, times.transfer_s, times.commit_s,
        times.resume_s,
    )  # fmt: skip


def test_marks_become_the_parts_they_bound():
    course = Course(accepted=10.1, ended=11.0, first=FirstTokens(queue_s=0.25, prefill_s=0.5))
    course.arrivals = [(10.5, 4), (10.9, 2)]
    times = course.times("p", 10.0, 11.25)
    assert parts_of(times) == pytest.approx((0.1, 0.25, 0.5, 0.05, 0.1, 0.25))
    assert times.arrivals == (pytest.approx((0.5, 4)), pytest.approx((0.9, 2)))
    assert (times.worker, times.failed) == ("p", False)


@given(seconds, seconds, seconds, seconds, seconds, st.booleans())
def test_parts_sum_to_the_whole_whatever_the_other_clock_says(ask, wait, back, queue, prefill, ok):
    course = Course(accepted=ask, ended=ask + wait, first=None)
    if ok:
        course.first = FirstTokens(queue_s=queue, prefill_s=prefill)
    times = course.times("p", 0.0, ask + wait + back)
    assert min(parts_of(times)) >= 0
    assert sum(parts_of(times)) == pytest.approx(ask + wait + back)
    assert times.failed is not ok


def test_nobody_was_asked():
    assert Course().times("p", 0.0, 1.0) is None


def test_arrivals_are_bounded(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("quire.worker.roles.course.time.monotonic", lambda: now[0])
    course = Course()
    for _ in range(1000):
        now[0] += 0.0015
        course.note_arrival()
        now[0] += 0.0015
        course.note_arrival()
    assert len(course.arrivals) <= MAX_ARRIVALS
    assert sum(blocks for _, blocks in course.arrivals) == 2000
