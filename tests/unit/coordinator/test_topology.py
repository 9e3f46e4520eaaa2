"""Epochs only grow, whoever says what there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.coordinator.topology import Epoch, Pod, Topology, next_term
from quire.proto import coordinator_pb2
from quire.router.coordinated import Seen

NAMES = st.sampled_from("abcdef")
PODS = st.dictionaries(NAMES, st.integers(1, 3)).map(
    lambda found: [Pod(name, f"h:{port}", "p", "m") for name, port in found.items()]
)


@given(st.lists(PODS, max_size=8))
def test_a_change_raises_the_version_and_nothing_else_does(steps):
    topology = Topology("f", Epoch(5, 0))
    for pods in steps:
        after = topology.with_pods(pods)
        changed = set(after.pods) != set(topology.pods)
        assert (after.epoch.version - topology.epoch.version) == changed
        assert set(after.pods) == set(pods)
        topology = after


@given(st.lists(st.integers(0, 1 << 40)), st.floats(0, 4e9))
def test_the_next_term_is_above_all_known_ones_and_the_clock(known, now):
    term = next_term(known, now)
    assert all(term > other for other in known)
    assert term >= int(now)
    assert term > 0


def test_a_successor_says_the_same_pods_in_a_later_epoch():
    before = Topology("f", Epoch(5, 9), (Pod("a", "h:1", "p", "m"),))
    after = before.in_term(6)
    assert after.pods == before.pods
    assert after.epoch > before.epoch


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), max_size=20))
def test_a_reader_never_goes_back(epochs):
    seen, latest = Seen(), (0, 0)
    for term, version in epochs:
        news = seen.accepts(coordinator_pb2.Topology(term=term, version=version))
        assert news == ((term, version) > latest)
        latest = max(latest, (term, version))
    assert seen.epoch == latest
