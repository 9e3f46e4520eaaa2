"""Jobs on a thread of their own: in order, failing where they are waited for."""

from __future__ import annotations

import gc
import threading

import pytest

from quire.engine.runner.stream import HostStream


def test_jobs_run_in_order_beside_whoever_gave_them() -> None:
    stream, done, go_on = HostStream("order"), [], threading.Event()

    def first() -> str:
        assert go_on.wait(30)
        done.append(1)
        return "one"

    waits = [stream.submit(first), stream.submit(lambda: done.append(2))]
    assert done == []
    go_on.set()
    assert [wait() for wait in waits] == ["one", None]
    assert done == [1, 2]


def test_a_job_that_fails_raises_where_it_is_waited_for_and_the_next_one_runs() -> None:
    stream = HostStream("failure")
    fails, works = stream.submit(lambda: 1 // 0), stream.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        fails()
    assert works() == 7


def test_the_thread_ends_with_its_stream() -> None:
    stream = HostStream("short-lived")
    stream.submit(lambda: None)()
    [thread] = [t for t in threading.enumerate() if t.name == "short-lived"]
    del stream
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
