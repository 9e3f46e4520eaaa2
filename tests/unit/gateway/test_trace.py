"""Timelines: parts without gaps, kept in bounds, and for their own tenant only."""

from __future__ import annotations

import asyncio

import pytest

from quire.api.errors import ApiError
from quire.gateway.placement import Place
from quire.gateway.replies import ClientGone
from quire.gateway.trace import MAX_ATTEMPTS, Trace, Traces
from quire.proto import worker_pb2


class Worker:
    name = "w"


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by a second at every look."""
    now = [100.0]

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("quire.gateway.trace.time.monotonic", tick)
    return now


def names(trace):
    return [part.name for part in trace.watch.parts]


def total(trace):
    return sum(part.seconds for part in trace.watch.parts)


def test_parts_follow_each_other_over_a_lost_worker(clock):
    trace = Trace("r")
    trace.watch.lap("read")
    prompt = trace.prompt()
    for number in range(2):
        prompt.lap("wait")
        prompt.sent(number, Place(Worker()), 0)
        if number == 0:
            prompt.left("lost")
    prompt.admitted(worker_pb2.Admission(inbox_s=0.25, queue_s=0.25, prefill_s=0.25))
    prompt.lap("not any more")
    trace.first_token()
    assert names(trace) == [
        "read", "wait", "route", "lost", "wait", "route", "network", "inbox", "queue", "prefill",
        "handout", "stream",
    ]  # fmt: skip
    assert total(trace) == pytest.approx(trace.watch.last - trace.watch.began)
    assert trace.ttft_s == pytest.approx(total(trace), abs=1.01)  # one more look at the clock
    assert [(a.number, a.lost) for a in prompt.attempts] == [(0, "lost"), (1, None)]


def test_what_the_worker_claims_beyond_the_time_there_was_makes_no_negative_part(clock):
    trace = Trace("r")
    prompt = trace.prompt()
    prompt.sent(0, Place(Worker()), 0)
    prompt.admitted(worker_pb2.Admission(prefill_s=50))
    assert min(part.seconds for part in trace.watch.parts) >= 0


def test_the_first_prompt_that_speaks_is_the_requests_timeline(clock):
    trace = Trace("r")
    slow, fast = trace.prompt(), trace.prompt()
    for prompt in (slow, fast):
        prompt.sent(0, Place(Worker()), 0)
    fast.admitted(worker_pb2.Admission())
    slow.admitted(worker_pb2.Admission())
    assert names(trace).count("network") == 1


def test_a_worker_that_reports_nothing_still_sums_up(clock):
    trace = Trace("r")
    trace.prompt().sent(0, Place(Worker()), 0)
    trace.first_token()
    assert names(trace) == ["route", "worker", "stream"]


async def test_a_remote_prompts_parts_and_chunks_are_told():
    trace = Trace("r")
    prompt = trace.prompt()
    prompt.sent(0, Place(Worker()), 0)
    remote = worker_pb2.RemotePrefill(worker="p", prefill_s=0.001, cached_tokens=16)
    remote.arrivals.add(after_s=0.5, blocks=3)
    prompt.admitted(worker_pb2.Admission(prefill_s=0.001, remote=remote))
    body = await trace.body()
    assert [part["name"] for part in body["parts"]] == [
        "route", "network", "inbox", "queue", "prefill_ask", "prefill_queue", "prefill", "transfer",
        "commit", "first_step", "handout",
    ]  # fmt: skip
    [shown] = body["prompts"]
    assert shown["transfer"] == {
        "prefill_worker": "p", "failed": False, "cached_tokens": 16,
        "chunks": [{"after_s": 0.5, "blocks": 3}],
    }  # fmt: skip
    assert body["state"] == "running"


def test_attempts_are_bounded():
    prompt = Trace("r").prompt()
    for number in range(2 * MAX_ATTEMPTS):
        prompt.sent(number, Place(Worker()), 0)
    assert len(prompt.attempts) == MAX_ATTEMPTS


def test_the_ring_keeps_the_latest_for_their_tenants():
    traces = Traces(capacity=2)
    for number in range(5):
        with traces.follow(str(number), b"mine") as trace:
            traces.name(trace, f"cmpl-{number}")
    assert traces.find("2", b"mine") is None
    assert traces.find("4", b"mine") is traces.find("cmpl-4", b"mine") is not None
    assert traces.find("4", b"other") is None
    with traces.follow("4", b"other") as theirs:
        assert traces.find("4", b"other") is theirs
        assert traces.find("4", b"mine") is not theirs


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ApiError("overloaded", "no"), "overloaded"),
        (ClientGone(), "client_gone"),
        (asyncio.CancelledError(), "client_gone"),
        (RuntimeError(), "internal_error"),
    ],
)
def test_a_trace_ends_with_what_ended_its_request(raised, code):
    traces = Traces()
    with pytest.raises(type(raised)), traces.follow("r", b"") as trace:
        raise raised
    assert trace.error == code
    assert trace.total_s is not None
