"""What is said to fit does fit; what does not is refused with what to change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.coordinator.capacity import Demand, Node, hosts_of, shortage

GPU_NODES = [Node(f"n{i}", f"10.0.0.{i}", cpus=16, gpus=8) for i in range(2)]


def test_what_fits_is_accepted():
    assert shortage(GPU_NODES, [Demand("p", 4, 4, 4)]) is None


def test_a_replica_of_one_rank_does_not_span_hosts():
    said = shortage(GPU_NODES, [Demand("p", 1, 1, 9)])
    assert said is not None
    assert "room for 0" in said


@pytest.mark.parametrize(
    ("demand", "hosts"),
    [
        (Demand("p", 1, 16, 8, ranks=8), 1),
        (Demand("p", 1, 16, 16, ranks=16), 2),
        (Demand("p", 1, 32, 8, ranks=8), 2),
        (Demand("p", 1, 1, 9, ranks=3), 1),  # what no host count makes fit stays whole
        (Demand("p", 1, 16, 16, {"a": "b"}, ranks=16), 1),
    ],
)
def test_what_is_too_large_for_a_host_goes_over_the_fewest(demand, hosts):
    assert hosts_of(GPU_NODES, demand) == hosts
    assert (shortage(GPU_NODES, [demand]) is None) == (hosts > 1 or demand.gpus == 8)


def test_replicas_over_several_hosts_are_counted_whole():
    nodes = [Node(f"n{i}", f"10.0.0.{i}", cpus=1) for i in range(5)]
    assert shortage(nodes, [Demand("p", 2, 2, ranks=2)]) is None
    assert "room for 2 beside" in (shortage(nodes, [Demand("p", 3, 2, ranks=2)]) or "")


def test_a_share_is_of_everything():
    assert Demand("p", 1, 4, 2, ranks=2).share(2) == {"CPU": 2.0, "GPU": 1.0}
    assert Demand("p", 1, 0.5).share(1) == {"CPU": 0.5}


def test_the_message_says_what_is_there_and_what_to_change():
    said = shortage(GPU_NODES, [Demand("decode", 5, 4, 4)])
    assert said == (
        "pool decode: 5 replicas of 4 CPU and 4 GPU are wanted, there is room for 4 beside the "
        "other pools on the nodes: 10.0.0.0 (16 CPU and 8 GPU), 10.0.0.1 (16 CPU and 8 GPU); lower "
        "the number of replicas to 4, or add nodes"
    )


def test_a_label_that_no_node_has_is_named():
    said = shortage(GPU_NODES, [Demand("decode", 1, 1, labels={"quire.pool": "decode"})])
    assert said is not None
    assert "no node is labelled quire.pool=decode" in said
    assert "--labels" in said


def test_pools_share_what_there_is():
    demands = [Demand("a", 1, 16), Demand("b", 2, 16)]
    assert "pool b" in (shortage(GPU_NODES, demands) or "")


sizes = st.sampled_from([0.5, 1.0, 2.0, 4.0])


@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from("xy")), max_size=4),
    st.lists(st.tuples(st.integers(0, 3), sizes, st.sampled_from(["x", "y", ""])), max_size=4),
)
def test_accepted_demands_never_exceed_any_group_of_nodes(hosts, pools):
    nodes = [Node(str(i), f"h{i}", cpus, labels={"k": k}) for i, (cpus, k) in enumerate(hosts)]
    demands = [
        Demand(str(i), count, size, labels={"k": k} if k else {})
        for i, (count, size, k) in enumerate(pools)
    ]
    if shortage(nodes, demands) is not None:
        return
    for label in ("x", "y"):
        have = sum(node.cpus for node in nodes if node.labels["k"] == label)
        assert sum(d.replicas * d.cpus for d in demands if d.labels.get("k") == label) <= have
    assert sum(d.replicas * d.cpus for d in demands) <= sum(node.cpus for node in nodes)


@pytest.mark.parametrize("replicas", [1, 2, 7])
def test_equal_replicas_are_refused_only_when_they_do_not_fit(replicas):
    nodes = [Node(str(i), f"h{i}", cpus=3) for i in range(3)]
    fits = replicas <= 3
    assert (shortage(nodes, [Demand("p", replicas, 2)]) is None) == fits
