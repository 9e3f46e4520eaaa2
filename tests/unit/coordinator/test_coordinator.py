"""The control loop around a fake cluster: all or nothing, one coordinator, nothing forgotten."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from fake_ray_cluster import FakeRayCluster

from quire.config.fleet import fleet_from
from quire.coordinator import coordinator as module
from quire.coordinator.capacity import Node
from quire.coordinator.coordinator import Coordinator, Deposed
from quire.coordinator.placement import HeadAway
from quire.coordinator.reconcile import State
from quire.coordinator.room import Refused
from quire.coordinator.service import CoordinatorService
from quire.coordinator.state import StateError, StateFolder
from quire.proto import coordinator_pb2


def make_fleet(replicas: int = 2, **fields):
    pools = [{"name": "p", "replicas": replicas, "cpus": 1} | fields]
    return fleet_from({"fleet": "f", "models": [{"name": "m", "pools": pools}]})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.01)
    monkeypatch.setattr(module, "LEADER_S", 0.05)
    monkeypatch.setattr(module, "LEAVE_S", 0.01)


class World:
    def __init__(self, folder, cluster=None, fleet=None) -> None:
        self.cluster = cluster or FakeRayCluster()
        self.drained: list[str] = []
        self.leads = False
        self.folder = StateFolder(folder)
        self.coordinator = Coordinator(
            fleet or make_fleet(), self.cluster, self.folder, self._leads, self._drain
        )

    async def _leads(self, leader) -> bool:
        return self.leads

    async def _drain(self, address: str) -> None:
        self.drained.append(address)

    async def until(self, true) -> None:
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0.005)

    def pods(self) -> dict[str, str]:
        return {pod.name: pod.address for pod in self.coordinator.topology.pods}


@asynccontextmanager
async def running(folder, **parts):
    world = World(folder, **parts)
    try:
        await world.coordinator.take_over()
        job = asyncio.create_task(world.coordinator.run())
        try:
            yield world
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
    finally:
        world.folder.close()


async def test_what_is_wanted_is_placed_and_told(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: set(world.pods()) == {"p-0", "p-1"})


async def test_more_than_there_is_room_for_is_refused_and_nothing_placed(tmp_path):
    with pytest.raises(Refused, match="5 replicas of 1 CPU are wanted, there is room for 4"):
        async with running(tmp_path, fleet=make_fleet(5)):
            pass
    cluster = FakeRayCluster()
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: len(world.pods()) == 2)
        before = list(cluster.log)
        with pytest.raises(Refused, match="lower the number of replicas to 4"):
            await world.coordinator.scale({"p": 9})
        with pytest.raises(Refused, match="no pool is called q; there are p"):
            await world.coordinator.scale({"q": 1})
        await asyncio.sleep(0.1)
        assert cluster.log == before
        assert world.coordinator.numbers == {"p": 2}


async def test_a_model_that_a_node_has_not_got_is_named(tmp_path):
    pools = [{"name": "p"}]
    fleet = fleet_from({"models": [{"name": "m", "engine": {"model": "/m/x"}, "pools": pools}]})
    cluster = FakeRayCluster()
    cluster.absent["/m/x"] = ["10.0.0.7"]
    with pytest.raises(Refused, match=r"/m/x is not on node 10.0.0.7: copy it there"):
        async with running(tmp_path, cluster=cluster, fleet=fleet):
            pass
    assert cluster.log == []
    assert cluster.leader is None


async def test_scaling_down_leaves_the_topology_first_then_drains_then_gives_the_place_back(
    tmp_path,
):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        await world.coordinator.scale({"p": 1})
        await world.until(lambda: ("remove", "p-1") in world.cluster.log)
        assert world.cluster.log[-2:] == [("stop", "p-1"), ("remove", "p-1")]
        assert set(world.pods()) == {"p-0"}


async def test_a_silent_supervisor_keeps_its_pod_in_the_topology(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        before, epoch = world.pods(), world.coordinator.topology.epoch
        world.cluster.silent.add("p-0")
        await world.until(lambda: not world.coordinator.replicas["p-0"].answers)
        await asyncio.sleep(0.1)
        assert world.pods() == before
        assert world.coordinator.topology.epoch == epoch


async def test_a_pod_that_cannot_be_asked_is_drained_by_its_address(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        address = world.pods()["p-1"]
        world.cluster.silent.add("p-1")
        await world.until(lambda: not world.coordinator.replicas["p-1"].answers)
        await world.coordinator.scale({"p": 1})
        await world.until(lambda: ("remove", "p-1") in world.cluster.log)
        assert world.drained == [address]


async def test_a_pod_that_moved_is_told_once_it_is_ready_and_the_old_one_drained(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        before = world.pods()["p-0"]
        moved = replace(world.cluster.reports["p-0"], address="10.0.0.9:1", state=State.STARTING)
        world.cluster.reports["p-0"] = moved
        await asyncio.sleep(0.1)
        assert world.pods()["p-0"] == before
        world.cluster.reports["p-0"] = replace(moved, state=State.READY)
        await world.until(lambda: world.pods()["p-0"] == "10.0.0.9:1")
        await world.until(lambda: world.drained == [before])


async def test_a_successor_finds_everything_and_says_it_in_a_later_term(tmp_path):
    cluster = FakeRayCluster()
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: len(world.pods()) == 2)
        await world.coordinator.scale({"p": 3})
        await world.coordinator.set_role("p-0", "prefill")
        await world.until(lambda: len(world.pods()) == 3)
        before, epoch = world.pods(), world.coordinator.topology.epoch
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: world.pods() == before)
        assert world.coordinator.topology.epoch > epoch
        assert world.coordinator.numbers == {"p": 3}
        assert world.coordinator.wanted["p-0"].role == "prefill"
        await asyncio.sleep(0.1)
        assert [what for what, _ in cluster.log] == ["place"] * 3


async def test_a_cluster_that_forgot_everything_is_told_again_and_pods_stay_meanwhile(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        before = world.pods()
    async with running(tmp_path) as world:
        assert world.pods() == before
        await world.until(lambda: len(world.cluster.log) == 2)
        await world.until(lambda: world.drained != [])


async def test_a_second_coordinator_is_refused(tmp_path):
    cluster = FakeRayCluster()
    async with running(tmp_path / "a", cluster=cluster) as world:
        with pytest.raises(StateError, match=r"another coordinator \(process \d+\) uses"):
            StateFolder(tmp_path / "a")
        other = World(tmp_path / "b", cluster)
        other.leads = True
        with pytest.raises(Refused, match="end that one first"):
            await other.coordinator.take_over()
        other.folder.close()
        assert world.coordinator.term in cluster.terms


async def test_one_that_was_taken_over_from_ends(tmp_path):
    cluster = FakeRayCluster()
    first = World(tmp_path / "a", cluster)
    await first.coordinator.take_over()
    job = asyncio.create_task(first.coordinator.run())
    second = World(tmp_path / "b", cluster)  # which could not reach the first
    await second.coordinator.take_over()
    with pytest.raises(Deposed, match="has taken over"):
        await asyncio.wait_for(job, 10)
    first.folder.close()
    second.folder.close()


async def test_without_a_head_what_runs_goes_on_and_scaling_waits(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        world.cluster.head_is_away = True
        await world.until(lambda: world.coordinator.head_problem != "")
        with pytest.raises(HeadAway):
            await world.coordinator.scale({"p": 3})
        assert len(world.pods()) == 2
        world.cluster.head_is_away = False
        await world.coordinator.scale({"p": 3})
        await world.until(lambda: len(world.pods()) == 3)
        await world.until(lambda: world.coordinator.head_problem == "")


async def test_a_node_that_vanished_does_not_end_a_restarted_coordinator(tmp_path):
    cluster = FakeRayCluster(Node("n0", "10.0.0.1", cpus=2))
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: len(world.pods()) == 2)
    cluster.node_list = []
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: len(world.pods()) == 2)


async def test_a_role_that_is_not_taken_is_not_kept(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        world.cluster.silent.add("p-0")
        with pytest.raises(Refused, match="does not take the role"):
            await world.coordinator.set_role("p-0", "prefill")
        assert world.coordinator.wanted["p-0"].role == "both"
        with pytest.raises(Refused, match="no pod is called q-0; there are p-0, p-1"):
            await world.coordinator.set_role("q-0", "prefill")
        await world.coordinator.set_role("p-1", "decode")
        await world.until(lambda: world.cluster.reports["p-1"].role == "decode")
        await asyncio.sleep(0.1)
        assert world.cluster.reports["p-1"].role == "decode"


async def states(world: World) -> dict[str, tuple[str, str, str]]:
    """Pod -> state, reason, address, as `quire status` has them."""
    service = CoordinatorService(world.coordinator, world.cluster)
    status = await service.Status(coordinator_pb2.StatusRequest(), None)
    return {pod.pod: (pod.state, pod.reason, pod.address) for pod in status.pods}


async def test_a_refused_replica_gives_its_place_back_and_waits_until_somebody_asks(tmp_path):
    cluster = FakeRayCluster()
    cluster.refusing["p-1"] = "no such dtype: give another"
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: ("remove", "p-1") in cluster.log)
        await asyncio.sleep(0.1)
        assert [each for each in cluster.log if each[1] == "p-1"] == [
            ("place", "p-1"), ("stop", "p-1"), ("remove", "p-1"),
        ]  # fmt: skip
        assert set(world.pods()) == {"p-0"}
        shown = await states(world)
        assert shown["p-1"] == ("refused", "no such dtype: give another", "")
        assert shown["p-0"][0] == "ready"

        await world.coordinator.scale({"p": 2})
        await world.until(lambda: cluster.log.count(("remove", "p-1")) == 2)
        cluster.refusing.clear()
        await world.coordinator.scale({"p": 2})
        await world.until(lambda: set(world.pods()) == {"p-0", "p-1"})
        assert (await states(world))["p-1"][:2] == ("ready", "")


async def test_a_refused_replica_is_tried_with_other_options_and_forgotten_with_its_pool(tmp_path):
    cluster = FakeRayCluster()
    cluster.refusing = {"p-0": "no", "p-1": "no"}
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: set(world.coordinator.refused) == {"p-0", "p-1"})
        await world.coordinator.scale({"p": 0})
        await world.until(lambda: world.coordinator.refused == {})
        await world.until(lambda: world.coordinator.replicas == {})
        await world.coordinator.scale({"p": 1})
        await world.until(lambda: cluster.log.count(("remove", "p-0")) == 2)
        assert await states(world) == {"p-0": ("refused", "no", "")}
    cluster.refusing = {}
    async with running(tmp_path, cluster=cluster, fleet=make_fleet(cpus=2)) as world:
        await world.until(lambda: set(world.pods()) == {"p-0"})


async def test_a_place_is_given_back_when_the_head_is_there_again(tmp_path):
    async with running(tmp_path) as world:
        await world.until(lambda: len(world.pods()) == 2)
        world.cluster.head_is_away = True
        await world.coordinator.scale({"p": 1})
        await world.until(lambda: ("stop", "p-1") in world.cluster.log)
        await world.until(lambda: world.coordinator.replicas["p-1"].problem != "")
        assert set(world.pods()) == {"p-0"}
        world.cluster.head_is_away = False
        await world.until(lambda: "p-1" not in world.coordinator.replicas)
        assert ("remove", "p-1") in world.cluster.log


async def test_readers_of_the_topology_see_the_stream_end_with_the_server(tmp_path):
    async with running(tmp_path) as world:
        service = CoordinatorService(world.coordinator, world.cluster)
        stream = service.Watch(coordinator_pb2.TopologyRequest(), None)
        await anext(stream)
        service.end()
        async with asyncio.timeout(5):
            assert [each async for each in stream] == []


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    folder = StateFolder(tmp_path)
    with pytest.raises(StateError, match="remove it"):
        folder.read()
    folder.close()


async def test_what_was_refused_takes_no_room_from_others(tmp_path):
    pools = [{"name": "p", "replicas": 3, "cpus": 1}, {"name": "q", "replicas": 1, "cpus": 1}]
    fleet = fleet_from({"fleet": "f", "models": [{"name": "m", "pools": pools}]})
    cluster = FakeRayCluster()  # of 4 CPUs
    cluster.refusing = dict.fromkeys(("p-0", "p-1", "p-2"), "no")
    async with running(tmp_path, cluster=cluster, fleet=fleet) as world:
        await world.until(lambda: len(world.coordinator.refused) == 3)
        await world.coordinator.scale({"q": 4})
        await world.until(lambda: set(world.pods()) == {"q-0", "q-1", "q-2", "q-3"})
        before = list(cluster.log)
        with pytest.raises(Refused, match="4 replicas of 1 CPU are wanted, there is room for 1"):
            await world.coordinator.scale({"p": 3})
        assert len(world.coordinator.refused) == 3
        assert cluster.log == before
        with pytest.raises(Refused, match="4 replicas of 1 CPU are wanted, there is room for 3"):
            await world.coordinator.scale({"p": 1})
        await world.coordinator.scale({"q": 1})
        await world.coordinator.scale({"p": 3})
        await world.until(lambda: cluster.log.count(("place", "p-2")) == 2)


async def test_that_every_replica_is_refused_is_told_with_what_to_change(tmp_path):
    cluster = FakeRayCluster()
    cluster.refusing = {"p-1": "no such dtype: give another"}
    async with running(tmp_path, cluster=cluster) as world:
        await world.until(lambda: set(world.coordinator.refused) == {"p-1"})
        told = asyncio.create_task(world.coordinator.refused.everyone())
        await asyncio.sleep(0.1)
        assert not told.done()
        cluster.reports["p-0"] = replace(
            cluster.reports["p-0"], state=State.REFUSED, reason="no such file: copy it"
        )
        async with asyncio.timeout(5):
            assert await told == "p-0 is refused: no such file: copy it"
