"""Two endpoints in one process, over the in-process transport, with and without faults."""

import time
from dataclasses import replace

import numpy as np
import pytest
from transfers import LAYOUT, Net, Side, newer, run

from quire.transfer.faults import FaultPlan
from quire.transfer.frames import Kind
from quire.transfer.layout import WIRE_VERSION, Shard, pieces, share
from quire.transfer.link import LinkRefused
from quire.transfer.state import Ended, Failure, Released, TransferRef


@pytest.fixture(autouse=True, params=["host", "staged"])
def memory(request, monkeypatch):
    """Of every side here: blocks in place, or through ten places."""
    monkeypatch.setattr(Side, "memory", request.param)


def test_bytes_arrive_and_every_block_comes_back_once():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        ref, there, here = run(p, d)
        assert there.failure is here.failure is None
        assert (there.commit.blocks, there.commit.tokens) == (12, 189)
        assert there.commit.meta == b"first token"
        assert d.delivered(ref) == {i: 30 + i for i in range(12)}
        assert p.returned(ref) == list(range(12))
        assert (d.pool[30:42] == p.pool[:12]).all()


def test_both_sides_count_what_went_over_and_the_receiver_learns_the_rate():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        for _ in range(4):
            run(p, d)
        key, sent = one_flow(p)
        assert key == ("sent", "pod-2", "tcp")
        block_bytes = d.pool.shape[1]
        assert (sent.num_bytes, sent.blocks) == (4 * 12 * block_bytes, 48)
        assert sent.outcomes == {"committed": 4}
        assert sent.busy_s > 0 and sent.exposed_s > 0
        key, received = one_flow(d)
        assert key == ("received", "pod-1", "tcp")
        assert (received.num_bytes, received.blocks) == (sent.num_bytes, 48)
        assert received.outcomes == {"committed": 4}
        # what was known before the last commit went out
        assert d.endpoint.counters.flows.receive_rates()["pod-1"] > 0
        assert p.endpoint.counters.flows.receive_rates() == {}
        refused = d.endpoint.receive(1)
        d.endpoint.cancel(refused)
        d.ended(refused)
        flows = dict(d.endpoint.counters.flows.items())
        assert flows["received", "unknown", "none"].outcomes == {"cancelled": 1}


def one_flow(side):
    (flow,) = side.endpoint.counters.flows.items()
    return flow


def test_blocks_go_out_chunk_by_chunk_and_window_by_window():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        ref = d.endpoint.receive(6)
        p.endpoint.send(ref, d.peer)
        p.endpoint.offer(ref, 0, [0, 1, 2])
        time.sleep(0.2)
        assert d.told() == p.told() == []
        d.endpoint.grant(ref, 0, [40, 41])
        d.wait(lambda e: d.delivered(ref).keys() == {0, 1})
        p.wait(lambda e: sorted(p.released(ref)) == [0, 1])
        d.endpoint.grant(ref, 2, [42, 43, 44, 45])
        p.endpoint.offer(ref, 3, [3, 4, 5])
        p.endpoint.commit(ref, blocks=6, tokens=96)
        assert d.ended(ref).failure is p.ended(ref).failure is None
        assert d.returned(ref) == list(range(40, 46))


@pytest.mark.parametrize(("source", "degree"), [(1, 2), (4, 2), (2, 4), (8, 2), (2, 8), (3, 1)])
def test_ranks_of_other_degrees_assemble_each_others_blocks(source, degree):
    heads = 12 if source == 3 else 4
    layout = replace(LAYOUT, num_kv_heads=heads)
    net, truth = Net(), np.random.default_rng(0).integers(0, 256, (8, layout.head_bytes * heads))
    whole = Shard()
    senders = [net.side(r, layout=layout, shard=Shard(r, source)) for r in range(source)]
    with net.side(100, layout=layout, shard=Shard(degree - 1, degree)) as d:
        mine = share(layout, whole, d.endpoint._identity.shard)
        ref = d.endpoint.receive(8, degree=source)
        d.endpoint.grant(ref, 0, range(8))
        sending = []
        for rank, p in enumerate(senders):
            span = share(layout, whole, Shard(rank, source)) or share(
                layout, whole, Shard(rank, source)
            )
            p.pool[:8] = truth[:, span.source : span.source + span.length]
            p.__enter__()
            p.endpoint.send(ref, d.peer)
            p.endpoint.offer(ref, 0, range(8))
            p.endpoint.commit(ref, blocks=8, tokens=128, meta=bytes([rank]))
            if share(layout, Shard(rank, source), d.endpoint._identity.shard) is None:
                assert p.ended(ref).failure is Failure.PROTOCOL
            else:
                sending.append(p)
        ended = d.ended(ref)
        assert ended.failure is None, ended
        assert all(p.ended(ref).failure is None for p in sending)
        assert (d.pool[:8] == truth[:, mine.source : mine.source + mine.length]).all()
        for p in senders:
            p.__exit__()
    assert len(pieces(mine)) >= 1


def test_another_layout_is_no_error_but_a_clear_no():
    net = Net()
    with net.side(1) as p, net.side(2, layout=replace(LAYOUT, dtype="float16")) as d:
        ref = d.endpoint.receive(2)
        p.endpoint.send(ref, d.peer)
        p.endpoint.offer(ref, 0, [5])
        ended = p.ended(ref)
        assert ended.failure is Failure.INCOMPATIBLE
        assert "dtype=float16 here dtype=bfloat16" in ended.detail
        p.wait(lambda _: p.returned(ref) == [5])  # the offer may come after the refusal


def test_a_wrong_token_makes_no_link_on_either_side():
    net = Net()
    with net.side(1, cluster_token="a") as p, net.side(2, cluster_token="b") as d:
        ref = d.endpoint.receive(1)
        d.endpoint.grant(ref, 0, [5])
        p.endpoint.send(ref, d.peer)
        assert p.ended(ref).failure is Failure.INCOMPATIBLE
        assert "token" in p.ended(ref).detail
        assert d.ended(ref).failure is Failure.LEASE
        assert d.returned(ref) == [5]
        assert not d.endpoint.counters.links and not p.endpoint.counters.links


@pytest.mark.parametrize("moment", ["before open", "open", "granted", "half"])
@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_cancel_from_either_side_frees_both(who, moment):
    net = Net()
    with net.side(1, kv_lease_s=8.0) as p, net.side(2, kv_lease_s=8.0) as d:
        ref = d.endpoint.receive(8)
        if moment != "before open":
            p.endpoint.send(ref, d.peer)
        if moment in ("granted", "half"):
            d.endpoint.grant(ref, 0, range(8))
        if moment == "half":
            p.endpoint.offer(ref, 0, range(4))
            d.wait(lambda e: len(d.delivered(ref)) == 4)
        (d if who == "receiver" else p).endpoint.cancel(ref)
        if moment == "before open" and who == "sender":
            return  # it never heard of the transfer
        start = time.monotonic()
        ended = d.ended(ref)
        expected = Failure.CANCELLED if who == "receiver" else Failure.PEER_CANCELLED
        assert ended.failure is expected
        if moment != "before open":
            assert p.ended(ref).failure in (
                Failure.FENCED, Failure.CANCELLED, Failure.PEER_CANCELLED,
            )  # fmt: skip
            assert p.returned(ref) == (list(range(4)) if moment == "half" else [])
        assert d.returned(ref) == (list(range(8)) if moment in ("granted", "half") else [])
        assert time.monotonic() - start < 6, "found by the lease and not pushed"


def test_a_later_attempt_fences_the_earlier_one():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        first = d.endpoint.receive(2)
        d.endpoint.grant(first, 0, [10, 11])
        p.endpoint.send(first, d.peer)
        p.endpoint.offer(first, 0, [0])
        d.wait(lambda e: d.delivered(first))
        second = d.endpoint.receive(1, after=first)
        assert (second.transfer, second.epoch) == (first.transfer, first.epoch + 1)
        before = d.pool.copy()
        p.endpoint.offer(first, 1, [1])
        assert p.ended(first).failure is Failure.PEER_CANCELLED
        assert d.returned(first) == [10, 11]
        assert (d.pool == before).all()
        d.endpoint.cancel(second)


def test_frames_of_another_incarnation_are_fenced_and_copied_nowhere():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        ref = d.endpoint.receive(2)
        d.endpoint.grant(ref, 0, [10, 11])
        before = d.pool.copy()
        zombie = TransferRef(ref.transfer, ref.epoch, ref.incarnation ^ 1)
        p.endpoint.send(zombie, d.peer)
        p.endpoint.offer(zombie, 0, [0, 1])
        assert p.ended(zombie).failure is Failure.FENCED
        assert p.returned(zombie) == [0, 1]
        assert d.endpoint.counters.fenced_frames >= 1
        assert (d.pool == before).all()
        d.endpoint.cancel(ref)
        assert d.ended(ref)


def test_what_is_granted_or_offered_after_the_end_comes_straight_back():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        ref, _, _ = run(p, d, 1, [3])
        d.endpoint.grant(ref, 0, [7])
        p.endpoint.offer(ref, 1, [9])
        d.wait(lambda e: e == Released(ref, (7,)))
        p.wait(lambda e: e == Released(ref, (9,)))


def test_a_wrong_use_ends_the_transfer_and_keeps_no_block():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        ref = d.endpoint.receive(2)
        d.endpoint.grant(ref, 0, [10])
        d.endpoint.grant(ref, 0, [11])
        assert d.ended(ref).failure is Failure.PROTOCOL
        assert d.returned(ref) == [10, 11]
        other = d.endpoint.receive(2)
        d.endpoint.grant(other, 0, [d.endpoint._core.node.memory.num_blocks])
        assert "not all in the pool" in d.ended(other).detail
        third = d.endpoint.receive(2)
        p.endpoint.send(third, d.peer)
        p.endpoint.offer(third, 0, [0])
        p.endpoint.commit(third, blocks=2, tokens=32)
        assert p.ended(third).failure is Failure.CANCELLED
        assert p.returned(third) == [0]


def test_close_ends_everything_with_its_events():
    net = Net()
    with net.side(1) as p:
        with net.side(2) as d:
            ref = d.endpoint.receive(4)
            d.endpoint.grant(ref, 0, range(4))
            p.endpoint.send(ref, d.peer)
            p.endpoint.offer(ref, 0, range(2))
            d.wait(lambda e: len(d.delivered(ref)) == 2)
        assert d.ended(ref).failure is Failure.LOST
        assert d.returned(ref) == [0, 1, 2, 3]
        assert p.ended(ref).failure is Failure.LOST
        assert p.returned(ref) == [0, 1]


# ---- faults


def outcome(plan, transfers=12):
    """Transfers under a plan: every one ends on both sides, nothing kept, nothing wrong."""
    net, good, failures = Net(plan), 0, []
    with net.side(1) as p, net.side(2) as d:
        for _ in range(transfers):
            d.pool[30:42] = 0
            ref, there, here = run(p, d)
            assert d.returned(ref) == list(range(30, 42))
            assert p.returned(ref) == list(range(12))
            for block, slot in d.delivered(ref).items():
                assert (d.pool[slot] == p.pool[block]).all(), "a wrong block was delivered"
            if there.failure is None:
                good += 1
                assert len(d.delivered(ref)) == 12
            else:
                failures.append(there.failure)
                assert here.failure is not None
        return good, failures, d.endpoint.counters


def damaged(counters):
    return sum(flow.damaged_pieces for _, flow in counters.flows.items())


def test_a_damaged_block_is_sent_again_and_counted():
    plan = FaultPlan(seed=3, corrupt=0.4, kinds=(Kind.DATA,))
    good, failures, counters = outcome(plan, 20)
    assert damaged(counters) > 0
    assert good > 5
    assert set(failures) <= {Failure.CHECKSUM, Failure.LEASE, Failure.FENCED, Failure.LOST}


def test_a_block_that_is_always_damaged_fails_the_transfer():
    good, failures, counters = outcome(FaultPlan(corrupt=1.0, kinds=(Kind.DATA,)), 2)
    assert good == 0
    assert damaged(counters) or failures == [Failure.FENCED] * 2


def test_duplicates_change_nothing():
    good, _, counters = outcome(FaultPlan(seed=1, duplicate=0.5))
    assert good == 12
    assert counters.duplicate_pieces > 0


def test_delays_change_nothing():
    assert outcome(FaultPlan(seed=1, delay=0.2, delay_s=0.02), 6)[0] == 6


@pytest.mark.parametrize("seed", [1, 2])
def test_lost_and_reordered_frames_end_in_a_failure_at_worst(seed):
    good, failures, _ = outcome(FaultPlan(seed=seed, drop=0.05, reorder=0.1), 8)
    assert good + len(failures) == 8


@pytest.mark.parametrize("after", range(5))
def test_a_side_that_falls_silent_is_noticed(after):
    start = time.monotonic()
    good, _, _ = outcome(FaultPlan(half_close_after=after), 1)
    assert good == 0 or after >= 3  # OPEN, DATA, COMMIT
    assert time.monotonic() - start < 6


def test_events_stop_after_the_last_one():
    net = Net(FaultPlan(seed=5, duplicate=0.3, corrupt=0.2))
    with net.side(1) as p, net.side(2) as d:
        refs = [run(p, d)[0] for _ in range(5)]
        for side in (p, d):
            for ref in refs:
                told = [e for e in side.told() if e.ref == ref]
                assert isinstance(told[-1], Ended)
                assert sum(isinstance(e, Ended) for e in told) == 1


def test_a_degree_that_the_heads_cannot_be_split_over_is_said_at_once():
    net = Net()
    with net.side(1) as d, pytest.raises(ValueError, match="cannot be split over 3 ranks"):
        d.endpoint.receive(4, degree=3)


def test_a_probe_measures_a_pair_and_says_why_it_cannot():
    net = Net()
    with (
        net.side(1) as p,
        net.side(2) as d,
        net.side(3, layout=replace(LAYOUT, dtype="float16")) as other,
    ):
        measured = p.endpoint.probe(d.peer, "tcp", 4 << 20).result(10)
        assert measured.bytes_per_s > 0
        assert 0 < measured.latency_p50_s <= measured.latency_p99_s
        assert dict(d.endpoint.counters.flows.items()) == {}, "a probe is no transfer"
        for peer, name, failure, words in (
            (other.peer, "tcp", Failure.INCOMPATIBLE, "dtype=float16 here dtype=bfloat16"),
            (d.peer, "nixl", Failure.UNREACHABLE, "pod-1 has no nixl"),
            (replace(d.peer, listeners=()), "tcp", Failure.UNREACHABLE, "pod-2 has no tcp"),
            (replace(d.peer, incarnation=1), "tcp", Failure.UNREACHABLE, "another process"),
        ):
            with pytest.raises(LinkRefused, match=words) as refused:
                p.endpoint.probe(peer, name).result(10)
            assert refused.value.failure is failure


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_later_wire_version_is_refused_with_the_reason_and_no_block_kept(which):
    net = Net()
    p, d = net.side(1), net.side(2)
    newer(p if which == "sender" else d, wire_version=WIRE_VERSION + 1)
    with p, d:
        ref = d.endpoint.receive(2)
        d.endpoint.grant(ref, 0, [3, 4])
        p.endpoint.send(ref, d.peer)
        p.endpoint.offer(ref, 0, [5])
        ended = p.ended(ref)
        assert ended.failure is Failure.INCOMPATIBLE
        assert ended.detail == f"wire version {WIRE_VERSION + 1}, here {WIRE_VERSION}"
        p.wait(lambda _: p.returned(ref) == [5])
        # the receiver does not wait for its lease in vain: its caller hears from the sender's side
        d.endpoint.cancel(ref)
        assert d.ended(ref).failure in (Failure.CANCELLED, Failure.LEASE)
        assert d.returned(ref) == [3, 4]
        with pytest.raises(LinkRefused, match="wire version"):
            p.endpoint.probe(d.peer, "tcp").result(10)
        # and both go on
        with net.side(3) as other:
            old = d if which == "sender" else p
            _, there, here = run(other, old)
            assert there.failure is here.failure is None


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_capabilities_and_fields_that_nobody_here_knows_change_nothing(which):
    net = Net()
    p, d = net.side(1), net.side(2)
    newer(p if which == "sender" else d)
    with p, d:
        _, there, here = run(p, d)
        assert there.failure is here.failure is None


def test_only_transports_that_both_know_are_tried():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        later = replace(d.peer, listeners=(("teleport", "beam:1"), *d.peer.listeners))
        assert p.endpoint.probe(later, "tcp", 1 << 20).result(10).bytes_per_s > 0
        ref = d.endpoint.receive(1)
        p.endpoint.send(ref, replace(later, listeners=later.listeners[:1]))
        ended = p.ended(ref)
        assert ended.failure is Failure.UNREACHABLE
        assert "no transport in common, here tcp" in ended.detail
        d.endpoint.cancel(ref)


def test_verbs_after_the_end_give_everything_back_at_once():
    net = Net()
    with net.side(1) as p, net.side(2) as d:
        pass
    ref = d.endpoint.receive(4)
    assert d.ended(ref, timeout_s=0).failure is Failure.CANCELLED
    d.endpoint.grant(ref, 0, [5, 6])
    assert d.released(ref) == [5, 6]
    d.endpoint.fence(ref)
    p.endpoint.send(ref, d.peer)
    assert p.ended(ref, timeout_s=0).failure is Failure.CANCELLED
    p.endpoint.offer(ref, 0, [7])
    assert p.released(ref) == [7]
    assert not p.endpoint._core.sender and not d.endpoint._core.receiver
