"""The engine's thread: what counts as progress."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from engines import make_engine, make_request

from quire.engine import loop as loop_module
from quire.engine.loop import EngineLoop


class Ears:
    """A sink that notes when a request has ended."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def on_step(self, record, outputs) -> None:
        if any(output.last_of_request for output in outputs):
            self.ended.set()

    def on_added(self, request) -> None:
        pass

    def on_rejected(self, request_id, error) -> None:
        raise AssertionError(error)

    def on_prefill_needed(self, needed) -> None:
        raise AssertionError("nothing is remote")

    on_blocks_ready = on_death = on_prefill_needed


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(loop_module, "time", clock)
    return clock


def test_a_long_step_that_gets_on_is_no_stall(clock) -> None:
    engine, ears = make_engine(), Ears()
    inside, go_on = threading.Event(), threading.Event()
    launch = engine.runner.launch

    def slowly(plan):
        inside.set()
        assert go_on.wait(30)
        return launch(plan)

    engine.runner.launch = slowly
    loop = EngineLoop(engine, ears)
    assert loop.stalled_s() == 0.0
    loop.start()
    loop.submit(make_request("a", [1, 2, 3], max_tokens=2))
    try:
        assert inside.wait(30)
        clock.now += 5
        assert loop.stalled_s() == 5.0
        engine.runner.operations += 1
        assert loop.stalled_s() == 0.0
        clock.now += 7
        assert loop.stalled_s() == 7.0
    finally:
        go_on.set()
    assert ears.ended.wait(30)
    assert loop.stop(30)
    clock.now += 60
    assert loop.stalled_s() == 0.0


def test_a_request_that_moves_leaves_its_full_blocks_behind() -> None:
    engine = make_engine()
    engine.add_request(make_request("a", list(range(40)), n=2, max_tokens=30, ignore_eos=True))
    for _ in range(20):
        engine.step()
    engine.scheduler.park("a", "parked")
    engine.abort("a")
    engine.pool.check_integrity()
    # 40 prompt and 19 output tokens computed per choice: two shared blocks, one of each
    assert engine.pool.counts().owned == 4
    engine.scheduler.handover.release("parked")
    assert engine.pool.counts().owned == 0
    assert engine.pool.counts().cached == 4
