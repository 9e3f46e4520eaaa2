"""A supervisor that answers nothing: Ray is told once per silence, and its engine left alone."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from waiting import until

from quire.config.fleet import CoordinatorConfig
from quire.coordinator import placement
from quire.coordinator.placement import RayCluster, Unreachable


class SilentActor:
    """Takes questions, and answers none."""

    def __init__(self) -> None:
        self.asked: list[Future] = []
        self.report = SimpleNamespace(remote=self._ask)

    def _ask(self) -> SimpleNamespace:
        self.asked.append(Future())
        return SimpleNamespace(future=lambda: self.asked[-1])


@pytest.fixture
def started_again(monkeypatch):
    """Actors that Ray was to start again."""
    told: list[SilentActor] = []
    monkeypatch.setattr(placement.actors, "start_again", told.append)
    monkeypatch.setattr(placement, "REPORT_TIMEOUT_S", 0.01)
    return told


async def test_it_is_started_again_once_it_has_been_silent_for_long(monkeypatch, started_again):
    cluster, actor = RayCluster(CoordinatorConfig()), SilentActor()
    cluster._actors["p-0"] = [actor]
    with pytest.raises(Unreachable):
        await cluster.report("p-0")
    assert started_again == []
    monkeypatch.setattr(placement, "SUPERVISOR_SILENCE_S", 0.0)
    with pytest.raises(Unreachable):
        await cluster.report("p-0")
    await until(lambda: started_again == [actor])
    monkeypatch.setattr(placement, "SUPERVISOR_SILENCE_S", 60.0)
    with pytest.raises(Unreachable):
        await cluster.report("p-0")
    assert started_again == [actor], "the next one has as much time"
    assert len(actor.asked) == 1, "no question is asked twice"
