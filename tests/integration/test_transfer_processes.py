"""KV transfer between two real processes, over every transport: identical bytes, and whatever
happens to one process, the other gives back every block within seconds."""

import importlib.util
import itertools
import subprocess
import time

import pytest
from transfer_process import RemoteSide, ended, returned
from transfers import Side
from waiting import wait_until

from quire.transfer.layout import BlockLayout
from quire.transfer.state import Failure

HAS_NIXL = importlib.util.find_spec("nixl_cu12") is not None
NIXL = pytest.mark.skipif(not HAS_NIXL, reason="needs nixl-cu12")
MARKS = {"tcp": (), "grpc": (), "nixl": (NIXL,)}
TRANSPORTS = [pytest.param(name, marks=marks) for name, marks in MARKS.items()]
# 1.5 MiB a block: more than one piece, and a kernel's buffer does not swallow a transfer whole.
BIG = BlockLayout("tiny", "float32", 16, num_layers=12, num_kv_heads=8, head_dim=128)
NOTICED_S = 4.0


def options(transport, **more):
    return {"kv_transports": (transport,), "layout": BIG, "num_blocks": 40, **more}


def poll(remote, ref, timeout_s=10.0):
    """The remote side's last event on a transfer."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (event := ended(remote.told(), ref)) is not None:
            return event
        time.sleep(0.02)
    raise AssertionError(remote.told())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_identical_bytes_arrive_chunk_by_chunk(transport):
    with (
        RemoteSide(seed=1, **options(transport)) as p,
        Side(seed=2, **options(transport)) as d,
    ):
        ref = d.endpoint.receive(30)
        p.send(ref, d.peer)
        for first in range(0, 30, 10):
            d.endpoint.grant(ref, first, range(39 - first, 29 - first, -1))
            p.offer(ref, first, range(first, first + 10))
        p.commit(ref, blocks=30, tokens=470, meta=b"m" * 1000)
        event = d.ended(ref)
        assert event.failure is None, event
        assert event.commit.meta == b"m" * 1000
        assert (d.pool[range(39, 9, -1)] == p.rows(range(30))).all()
        assert poll(p, ref).failure is None
        assert returned(p.told(), ref) == list(range(30))
        assert d.returned(ref) == list(range(10, 40))


def start(moment, p, d):
    """Bring a transfer to a moment. The verbs are the same on both kinds of side."""
    ref = d.endpoint.receive(30)
    if moment == "promised":
        d.endpoint.grant(ref, 0, range(10))
        return ref
    p.endpoint.send(ref, d.peer)
    if moment == "opening":
        # The sender is there, and has blocks; nothing is granted.
        p.endpoint.offer(ref, 0, range(4))
        wait_until(lambda: d.state(ref) == "receiving", "the leg is open")
        assert p.state(ref) == "opening"
        return ref
    d.endpoint.grant(ref, 0, range(20))
    p.endpoint.offer(ref, 0, range(4))
    wait_until(lambda: len(returned(p.told(), ref)) == 4, "the first blocks arrived")
    if moment == "flowing":
        p.endpoint.offer(ref, 4, range(4, 24))
    if moment == "committing":
        # All granted blocks are there, the rest is offered and waits for grants for ever.
        p.endpoint.offer(ref, 4, range(4, 30))
        p.endpoint.commit(ref, blocks=30, tokens=480)
    return ref


def moments(*names):
    """(transport, how, moment); by default over tcp alone where a transport has little part in."""
    cells = []
    for transport, how, moment in itertools.product(MARKS, ("kill", "stop"), names):
        is_slow = moment not in FLOWING and transport != "tcp"
        marks = (*MARKS[transport], *([pytest.mark.slow] if is_slow else ()))
        cells.append(pytest.param(transport, how, moment, marks=marks))
    return cells


FLOWING = ("open", "flowing", "committing")
# How many blocks were granted, and offered, by moment.
GRANTED = {"promised": 10, "opening": 0, "open": 20, "flowing": 20, "committing": 20}
OFFERED = {"promised": 4, "opening": 4, "open": 4, "flowing": 24, "committing": 30}


@pytest.mark.parametrize(("transport", "how", "moment"), moments(*GRANTED))
def test_a_sender_that_dies_or_hangs_leaves_nothing_at_the_receiver(transport, how, moment):
    with (
        RemoteSide(seed=1, **options(transport)) as p,
        Side(seed=2, **options(transport)) as d,
    ):
        before = p.rows(range(40))
        ref = start(moment, p, d)
        getattr(p, how)()
        begin = time.monotonic()
        event = d.ended(ref)
        assert time.monotonic() - begin < NOTICED_S
        assert event.failure is (Failure.LEASE if moment == "promised" else Failure.LOST)
        assert d.returned(ref) == list(range(GRANTED[moment]))
        for block, slot in d.delivered(ref).items():
            assert (d.pool[slot] == before[block]).all()
        d.endpoint.grant(ref, 20, [20, 21])  # the caller has yet to read of the end
        d.wait(lambda _: {20, 21} <= set(d.released(ref)))
        if how == "stop":
            check_that_a_zombie_writes_nothing(p, d)


def check_that_a_zombie_writes_nothing(p, d):
    """Resumed, the sender sends on what it had begun: not one byte of it may arrive."""
    held = d.pool.copy()
    p.resume()
    time.sleep(0.7)
    assert (d.pool == held).all()


@pytest.mark.parametrize(("transport", "how", "moment"), moments(*GRANTED))
def test_a_receiver_that_dies_or_hangs_leaves_nothing_at_the_sender(transport, how, moment):
    with (
        Side(seed=1, **options(transport)) as p,
        RemoteSide(seed=2, **options(transport)) as d,
    ):
        ref = start(moment, p, d)
        getattr(d, how)()
        if moment == "promised":  # the sender finds out that it comes too late
            p.endpoint.send(ref, d.peer)
            p.endpoint.offer(ref, 0, range(4))
        begin = time.monotonic()
        event = p.ended(ref)
        assert time.monotonic() - begin < NOTICED_S
        assert event.failure in (Failure.LOST, Failure.LEASE, Failure.UNREACHABLE)
        assert (event.failure is Failure.UNREACHABLE) <= (moment == "promised")
        assert p.returned(ref) == list(range(OFFERED[moment]))
        if how == "stop":  # and it finds out itself when it runs again
            d.resume()
            failed = poll(d, ref).failure
            assert failed is (Failure.LEASE if moment == "promised" else Failure.LOST)
            assert returned(d.told(), ref) == list(range(GRANTED[moment]))


def drain(p, d, *, at):
    """A transfer that was cancelled at one side while that side copies some of its blocks."""
    ref = start("promised", p, d)
    p.endpoint.send(ref, d.peer)
    p.endpoint.offer(ref, 0, range(4))
    assert at.is_copying()
    at.endpoint.cancel(ref)
    wait_until(lambda: at.state(ref) == "draining", "it drains")
    return ref


@pytest.mark.parametrize(("transport", "how", "who"), moments("sender", "receiver"))
def test_a_side_that_drains_gives_its_blocks_back_whatever_happens_to_the_other(
    transport, how, who
):
    kinds = {"memory": "gated", "staging_places": 20}
    with (
        Side(seed=1, **options(transport, **kinds)) as here,
        RemoteSide(seed=2, **options(transport)) as there,
    ):
        p, d = (here, there) if who == "sender" else (there, here)
        ref = drain(p, d, at=here)
        getattr(there, how)()
        time.sleep(1.5)  # longer than leases and heartbeats bear
        assert here.state(ref) == "draining", "a copy is still under way"
        here.let_copies_through()
        assert here.ended(ref).failure is Failure.CANCELLED
        assert here.returned(ref) == list(range(4 if who == "sender" else 10))
        if how == "stop":
            there.resume()
            assert poll(there, ref).failure in (
                Failure.PEER_CANCELLED, Failure.LOST, Failure.FENCED, Failure.LEASE,
            )  # fmt: skip
            assert returned(there.told(), ref) == list(range(10 if who == "sender" else 4))


@pytest.mark.parametrize(("transport", "how", "who"), moments("sender", "receiver"))
def test_a_side_that_dies_or_hangs_while_it_drains_leaves_nothing_at_the_other(transport, how, who):
    kinds = {"memory": "gated", "staging_places": 20}
    with (
        Side(seed=1, **options(transport)) as here,
        RemoteSide(seed=2, **options(transport, **kinds)) as there,
    ):
        p, d = (there, here) if who == "sender" else (here, there)
        ref = drain(p, d, at=there)
        getattr(there, how)()
        assert here.ended(ref).failure in (Failure.PEER_CANCELLED, Failure.LOST)
        assert here.returned(ref) == list(range(10 if who == "sender" else 4))
        if how == "stop":
            there.resume()
            there.let_copies_through()
            assert poll(there, ref).failure is Failure.CANCELLED
            assert returned(there.told(), ref) == list(range(4 if who == "sender" else 10))


@pytest.mark.parametrize("who", ["sender", "receiver"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cancel_reaches_the_other_process(transport, who):
    with (
        RemoteSide(seed=1, **options(transport)) as p,
        Side(seed=2, **options(transport)) as d,
    ):
        ref = start("flowing", p, d)
        (p if who == "sender" else d).endpoint.cancel(ref)
        begin = time.monotonic()
        assert d.ended(ref).failure in (Failure.CANCELLED, Failure.PEER_CANCELLED)
        assert poll(p, ref).failure in (
            Failure.CANCELLED, Failure.PEER_CANCELLED, Failure.FENCED,
        )  # fmt: skip
        assert time.monotonic() - begin < NOTICED_S
        assert d.returned(ref) == list(range(20))
        assert returned(p.told(), ref) == list(range(24))
        # and the link still works
        again = d.endpoint.receive(3)
        d.endpoint.grant(again, 0, [30, 31, 32])
        p.endpoint.send(again, d.peer)
        p.endpoint.offer(again, 0, [5, 6, 7])
        p.endpoint.commit(again, blocks=3, tokens=48)
        assert d.ended(again).failure is None
        assert (d.pool[30:33] == p.rows([5, 6, 7])).all()


def test_nobody_at_the_address_is_said_within_the_connect_timeout():
    with Side(seed=1, kv_transports=("tcp", "grpc")) as p:
        with Side(seed=2, kv_transports=("tcp", "grpc")) as d:
            ref, peer = d.endpoint.receive(1), d.peer
        p.endpoint.send(ref, peer, lease_s=30)
        event = p.ended(ref, 12)
        assert event.failure is Failure.UNREACHABLE
        assert "tcp" in event.detail and "grpc" in event.detail


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Files of a pod of a cluster's authority, of another with its own name only, of a stranger."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    for name in ("ours", "strangers"):
        openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", f"{name}-ca.key", "-out", f"{name}-ca.pem", "-subj", f"/CN={name}",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-days", "2",
        )  # fmt: skip
    authorities = {"ours": "ours", "strangers": "strangers", "named": "ours"}
    for name, authority in authorities.items():
        openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=pod",
            "-addext", "subjectAltName=" + ("DNS:d.pods" if name == "named" else "IP:127.0.0.1"),
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}-ca.pem", "-copy_extensions",
            "copy", "-CAkey", f"{authority}-ca.key", "-out", f"{name}.pem", "-days", "2",
        )  # fmt: skip

    def files(name):
        return {
            "cluster_tls_cert": str(folder / f"{name}.pem"),
            "cluster_tls_key": str(folder / f"{name}.key"),
            "cluster_tls_ca": str(folder / f"{authorities[name]}-ca.pem"),
        }

    return files


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_mutual_tls_carries_blocks_and_refuses_strangers(transport, certificates):
    ours = certificates("ours")
    with (
        Side(seed=1, **options(transport, **ours, cluster_token="t")) as p,
        Side(seed=2, **options(transport, **ours, cluster_token="t")) as d,
        Side(seed=3, **options(transport, **certificates("strangers"))) as stranger,
        Side(seed=4, **options(transport)) as plain,
    ):
        ref = d.endpoint.receive(10)
        d.endpoint.grant(ref, 0, range(10))
        for other in (stranger, plain):
            other.endpoint.send(ref, d.peer)
            assert other.ended(ref).failure is Failure.UNREACHABLE
            d.endpoint.renew(ref)
        p.endpoint.send(ref, d.peer)
        p.endpoint.offer(ref, 0, range(10))
        p.endpoint.commit(ref, blocks=10, tokens=160)
        assert d.ended(ref).failure is None
        assert (d.pool[:10] == p.pool[:10]).all()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_certificate_for_another_name_than_was_dialled_is_refused(transport, certificates):
    with (
        Side(seed=1, **options(transport, **certificates("ours"), cluster_token="t")) as p,
        Side(seed=2, **options(transport, **certificates("named"), cluster_token="t")) as d,
    ):
        p.endpoint.send(ref := d.endpoint.receive(1), d.peer)
        assert p.ended(ref).failure is Failure.UNREACHABLE
        d.endpoint.send(ref := p.endpoint.receive(1), p.peer)  # who dials may be at any address
        p.endpoint.grant(ref, 0, [3])
        d.endpoint.offer(ref, 0, [4])
        d.endpoint.commit(ref, blocks=1, tokens=16)
        assert d.ended(ref).failure is None
        assert (p.pool[3] == d.pool[4]).all()
