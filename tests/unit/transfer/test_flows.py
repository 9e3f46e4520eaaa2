"""Counts per peer, and the rate that is made of them."""

from quire.transfer.flows import MAX_FLOWS, MAX_RATES, MEMORY_BYTES, MIN_RATE_BYTES, Flow, Flows


def test_a_rate_needs_enough_bytes():
    flow = Flow()
    flow.busy(0.001)
    flow.acknowledged(MIN_RATE_BYTES - 1)
    assert flow.bytes_per_s == 0
    flow.acknowledged(1)
    assert flow.bytes_per_s == MIN_RATE_BYTES / 0.001


def test_a_rate_forgets_what_was_long_ago():
    flow = Flow()
    for bytes_per_s in (1e9, 1e8):
        for _ in range(1000):
            flow.busy((1 << 20) / bytes_per_s)
            flow.acknowledged(1 << 20)
    assert 1e8 <= flow.bytes_per_s < 1.3e8
    assert MEMORY_BYTES < 1000 << 20, "the test moves more than is remembered"


def test_time_without_acknowledgement_counts_against_the_rate():
    flow = Flow()
    flow.acknowledged(10 << 20)
    flow.busy(1.0)
    fast = flow.bytes_per_s
    flow.busy(9.0)
    assert flow.bytes_per_s == fast / 10


def test_peers_without_end_are_counted_together():
    flows = Flows()
    for number in range(MAX_FLOWS + 10):
        flows.of("sent", f"pod-{number}", "tcp").blocks += 1
    kept = dict(flows.items())
    assert len(kept) == MAX_FLOWS + 1
    assert kept["sent", "others", "tcp"].blocks == 10
    for number in range(MAX_RATES + 10):
        flows.note_rate(f"pod-{number}", 1e9)
    assert len(flows.receive_rates()) == MAX_RATES
    assert "pod-0" not in flows.receive_rates()


def test_a_peer_that_does_not_know_its_rate_changes_nothing():
    flows = Flows()
    flows.note_rate("pod-1", 2e9)
    flows.note_rate("pod-1", 0)
    assert flows.receive_rates() == {"pod-1": 2e9}
