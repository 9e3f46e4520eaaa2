"""Frames, greetings, and the bytes of a connection however they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfers import LAYOUT

from quire.config.transfer import TransferConfig
from quire.transfer.frames import (
    Entry,
    FrameError,
    Header,
    Kind,
    checksum,
    digest,
    pack,
    pack_entries,
    unpack,
    unpack_entries,
)
from quire.transfer.intake import Intake
from quire.transfer.layout import Shard
from quire.transfer.negotiate import Identity, Peer, choose, compatibility

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))


@given(st.sampled_from(list(Kind)), U16, st.integers(0, 1 << 20), U64, U64, U32, U32, U64)
def test_headers_round_trip(kind, rank, length, transfer, incarnation, epoch, first, sequence):
    header = Header(kind, rank, length or 1, 3, transfer, incarnation, epoch, first, sequence)
    data = pack(header)
    assert len(data) == 64
    assert unpack(data) == header


@given(st.integers(0, 63), st.integers(0, 7))
def test_any_flipped_bit_of_a_header_is_found(byte, bit):
    data = bytearray(pack(Header(Kind.PING, transfer=5)))
    data[byte] ^= 1 << bit
    with pytest.raises(FrameError):
        unpack(data)


def test_a_header_promising_too_much_is_refused():
    with pytest.raises(FrameError, match="too long"):
        unpack(pack(Header(Kind.COMMIT, length=1 << 30)))


@given(st.lists(st.tuples(U32, U32, U64), max_size=20), st.randoms())
def test_tables_round_trip_and_the_digest_does_not_depend_on_their_order(rows, random):
    entries = [Entry(*row) for row in rows]
    assert unpack_entries(pack_entries(entries)) == entries
    shuffled = entries[:]
    random.shuffle(shuffled)
    assert digest(shuffled) == digest(entries)


class Recorder:
    """Takes everything; pieces go to `pool` while `open`."""

    def __init__(self):
        self.frames, self.good, self.done = [], [], []
        self.pool = {}
        self.open = True

    def on_frame(self, header, body):
        self.frames.append((header.kind, body))

    def places(self, header, entries):
        self.entries = entries
        if header.transfer != 1:
            return None
        return [
            self.pool.setdefault(e.block, memoryview(bytearray(10 * (e.block + 1))))
            for e in entries
        ]

    def holds(self):
        return self.open

    def landed(self, number):
        entry = self.entries[number]
        self.good.append((entry.block, checksum(self.pool[entry.block]) == entry.checksum))

    def finished(self, header):
        self.done.append(header.sequence)


def data_frame(payloads, *, transfer=1, sequence=1, lie=False):
    entries = [Entry(b, 0, checksum(p) ^ lie) for b, p in payloads.items()]
    table = pack_entries(entries)
    pieces = b"".join(payloads.values())
    header = Header(Kind.DATA, num=len(entries), transfer=transfer, sequence=sequence)
    return pack(header._replace(length=len(table) + len(pieces)), table) + pieces


def push(intake, data):
    intake.feed(data)
    return len(data)


def pull(intake, data):
    """As a socket does: into the buffers that the intake names."""
    left = data
    for buffer in intake.buffers():
        assert buffer
        count = min(len(buffer), len(left))
        buffer[:count], left = left[:count], left[count:]
    intake.advance(len(data) - len(left))
    return len(data) - len(left)


@pytest.mark.parametrize("give", [push, pull])
@given(cuts=st.lists(st.integers(1, 90), min_size=1, max_size=60))
def test_frames_come_out_whole_however_the_bytes_are_cut(give, cuts):
    blocks = {0: b"a" * 10, 2: b"c" * 30}
    stream = b"".join([
        pack(Header(Kind.PING)), data_frame(blocks), pack(Header(Kind.COMMIT), b"body"),
        data_frame({1: b"x" * 20}, transfer=2, sequence=7),
        pack(Header(Kind.PROBE, length=33, sequence=9)), bytes(33), pack(Header(Kind.KEEP)),
    ])  # fmt: skip
    recorder = Recorder()
    intake, at, turn = Intake(recorder), 0, 0
    while at < len(stream):
        at += give(intake, stream[at : at + cuts[turn % len(cuts)]])
        turn += 1
    assert recorder.frames == [(Kind.PING, b""), (Kind.COMMIT, b"body"), (Kind.KEEP, b"")]
    assert recorder.good == [(0, True), (2, True)]
    assert {b: bytes(v) for b, v in recorder.pool.items()} == blocks
    assert recorder.done == [1, 7, 9]


@pytest.mark.parametrize("give", [push, pull])
def test_a_place_that_is_gone_in_the_middle_takes_the_rest_nowhere(give):
    recorder = Recorder()
    intake = Intake(recorder)
    frame = data_frame({0: b"x" * 10, 1: b"y" * 20, 2: b"z" * 30})

    def send(data):
        while data:
            data = data[give(intake, data) :]

    send(frame[: -(12 + 30)])
    recorder.open = False
    send(frame[-(12 + 30) :] + pack(Header(Kind.PING)))
    assert bytes(recorder.pool[1]) == b"y" * 8 + bytes(12)
    assert bytes(recorder.pool[2]) == bytes(30)
    assert recorder.good == [(0, True)]
    assert recorder.done == [1]
    assert recorder.frames == [(Kind.PING, b"")]


@pytest.mark.parametrize("kind", [Kind.COMMIT, Kind.DATA])
def test_a_flipped_bit_in_a_message_or_a_table_ends_the_connection(kind):
    """A commit carries the first tokens: they are as precious as the blocks."""
    body = pack_entries([Entry(0, 0, checksum(b"x"))])
    frame = bytearray(pack(Header(kind, num=1, length=len(body) + (kind == Kind.DATA)), body))
    frame[64 + 7] ^= 4
    with pytest.raises(FrameError, match="damaged body"):
        Intake(Recorder()).feed(frame)


def test_a_wrong_checksum_is_reported():
    recorder = Recorder()
    Intake(recorder).feed(data_frame({0: b"a" * 10}, lie=True))
    assert recorder.good == [(0, False)]


def test_lengths_that_do_not_add_up_end_the_connection():
    with pytest.raises(FrameError, match="does not fit"):
        Intake(Recorder()).feed(data_frame({0: b"a" * 11}))


# ---- who may talk to whom


def identity(token="t"):
    return Identity(LAYOUT, Shard(), "pod", 5, 0.5, token)


def test_a_proof_holds_for_its_role_token_and_nonces_only():
    a, b = b"a" * 32, b"b" * 32
    proof = identity().prove("dialler", a, b)
    assert identity().accepts(proof, "dialler", a, b)
    assert not identity("other").accepts(proof, "dialler", a, b)
    assert not identity().accepts(proof, "acceptor", a, b)
    assert not identity().accepts(proof, "dialler", b, a)
    assert not identity().accepts(identity().prove("dialler", b"", b), "dialler", b"", b)


def test_an_unknown_capability_of_a_newer_peer_is_no_obstacle_but_another_wire_version_is():
    hello = identity().hello([("teleport", "x")], ["teleport"])
    assert compatibility(identity(), hello) is None
    hello.wire_version = 2
    assert "wire version 2, here 1" in compatibility(identity(), hello).reason


def test_a_degree_that_does_not_fit_is_incompatible():
    hello = identity().hello([], [])
    hello.degree = 3
    assert "cannot be split over 3" in compatibility(identity(), hello).reason


def test_transports_are_tried_by_preference_until_two_were_measured():
    offered = [("nixl", "n"), ("grpc", "g"), ("tcp", "t"), ("teleport", "x")]
    names = lambda rates: [t for t, _ in choose(("tcp", "grpc", "nixl"), offered, rates)]  # noqa: E731
    assert names({}) == ["tcp", "grpc", "nixl"]
    assert names({"grpc": 1e9}) == ["tcp", "grpc", "nixl"]
    assert names({"tcp": 1e9, "nixl": 3e9}) == ["nixl", "tcp", "grpc"]


def test_a_peer_round_trips_through_its_message():
    peer = Peer("pod-3", 2**64 - 1, Shard(1, 4), (("tcp", "10.0.0.1:5"), ("grpc", "h:6")))
    assert Peer.from_proto(peer.to_proto()) == peer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_host": "0.0.0.0"}, "a cluster_token is needed"),
        ({"kv_transports": ("carrier-pigeon",)}, "must be of tcp, grpc, nixl"),
        ({"kv_transports": ()}, "at least one"),
        ({"cluster_tls_cert": "a.pem"}, "go together"),
        ({"kv_lease_s": 0.0}, "must be more than 0"),
        ({"kv_window_bytes": 5}, "at least 2 MiB"),
    ],
)
def test_mistakes_in_the_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TransferConfig(**options)


def test_the_token_shows_nowhere():
    config = TransferConfig(kv_host="0.0.0.0", cluster_token="hush")
    assert "hush" not in repr(config)
