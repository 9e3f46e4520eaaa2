"""The connections of a gang: both directions at once, encrypted, only with those who belong."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from certificates import certificate_files
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.cluster.tls import tls_context
from quire.config.cluster import ClusterConfig
from quire.config.transfer import TransferConfig
from quire.engine.parallel import greeting
from quire.engine.parallel.calls import Calls, answer_to
from quire.engine.parallel.channel import Channel, Kind
from quire.engine.parallel.duties import OwnHost
from quire.engine.parallel.gang import Gang, RankFailed
from quire.engine.parallel.kv import config_of
from quire.engine.parallel.members import Member, Node
from quire.engine.parallel.watch import Watch


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    return {
        name: ClusterConfig(cluster_token="t", **certificate_files(folder, name))
        for name in ("ours", "theirs")
    } | {"plain": ClusterConfig(cluster_token="t")}


def connect(dialler: ClusterConfig, acceptor: ClusterConfig) -> tuple[Channel, Channel]:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def accept() -> Channel:
            sock = listener.accept()[0]
            sock.settimeout(5)
            return Channel.over(sock, tls_context(acceptor, server=True), is_dialler=False)

        accepted = pool.submit(accept)
        sock = socket.create_connection(listener.getsockname(), 5)
        try:
            mine = Channel.over(sock, tls_context(dialler, server=False), is_dialler=True)
        except OSError:
            with contextlib.suppress(OSError):
                accepted.result().close()
            raise
        try:
            return mine, accepted.result()
        except OSError:
            mine.close()
            raise


@pytest.mark.parametrize("name", ["ours", "plain"])
@settings(max_examples=5, deadline=None)
@given(sizes=st.lists(st.integers(0, 200_000), min_size=1, max_size=30))
def test_both_sides_send_while_they_receive(clusters, name, sizes) -> None:
    """More than the sockets' buffers hold: a side that does not read while it writes would hang."""
    pair = connect(clusters[name], clusters[name])
    messages = [secrets.token_bytes(size) for size in sizes] * 4

    def send(channel: Channel) -> None:
        for message in messages:
            channel.send(Kind.STEP, message)

    senders = [threading.Thread(target=send, args=(channel,)) for channel in pair]
    with ThreadPoolExecutor(2) as pool:
        received = [
            pool.submit(lambda c: [c.receive() for _ in messages], channel) for channel in pair
        ]
        for sender in senders:
            sender.start()
        for each in received:
            assert each.result(60) == [(Kind.STEP, message) for message in messages]
    for sender, channel in zip(senders, pair, strict=True):
        sender.join()
        assert not channel.has_pending
        channel.close()


def test_several_messages_of_one_record_are_not_left_lying(clusters) -> None:
    mine, other = connect(clusters["ours"], clusters["ours"])
    mine._stream.sendall(b"".join(bytes([Kind.BEAT, 0, 0, 0, 0]) for _ in range(3)))
    other.receive()
    assert other.has_pending
    assert other.receive() == other.receive() == (Kind.BEAT, b"")
    assert not other.has_pending
    mine.close()
    with pytest.raises(EOFError):
        other.receive()
    other.close()


@pytest.mark.parametrize("pair", [("theirs", "ours"), ("plain", "ours"), ("ours", "plain")])
def test_a_stranger_does_not_get_a_channel(clusters, pair) -> None:
    dialler, acceptor = (clusters[name] for name in pair)
    with pytest.raises((OSError, EOFError, ValueError)):
        mine, other = connect(dialler, acceptor)
        try:  # TLS 1.3: the dialler may think that it is connected
            with ThreadPoolExecutor(1) as pool:
                pool.submit(greeting.receive, other, lambda _: "t")
                greeting.introduce(mine, "t", rank=1)
        finally:
            mine.close()
            other.close()


def greet(ours: str, theirs: str):
    """What the acceptor and the dialler have of each other."""
    plain = ClusterConfig()
    mine, other = connect(plain, plain)

    def secret_of(hello) -> str:
        if hello["rank"] != 1:
            raise LookupError
        return ours

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(greeting.receive, other, secret_of)
        try:
            return greeting.introduce(mine, theirs, rank=1), found.result()
        finally:
            mine.close()
            other.close()


def test_who_knows_the_secret_shares_a_key_that_never_travels() -> None:
    key, hello = greet("secret", "secret")
    assert hello["key"] == key
    assert hello["rank"] == 1
    assert greet("secret", "secret")[0] != key


def test_who_does_not_know_the_secret_is_refused() -> None:
    with pytest.raises(greeting.Refused, match="does not know this cluster's token"):
        greet("secret", "another")


def test_another_version_is_told_what_to_change() -> None:
    plain = ClusterConfig()
    mine, other = connect(plain, plain)
    mine.send_json(Kind.HELLO, {"rank": 1, "version": "0.0", "nonce": "00" * 32})
    assert greeting.receive(other, lambda _: "") is None
    kind, said = mine.receive()
    assert kind is Kind.FAILED
    assert b"this is quire 0.0, rank 0 is" in said
    mine.close()
    other.close()


@pytest.mark.parametrize("hello", [{}, {"rank": 1}, {"rank": 2, "version": "x"}, [], None, 5])
def test_whatever_a_stranger_says_it_is_turned_away(hello) -> None:
    plain = ClusterConfig()
    mine, other = connect(plain, plain)
    mine.send_json(Kind.HELLO, hello)
    mine.close()
    assert greeting.receive(other, lambda _: "") is None
    other.close()


def test_an_answer_that_comes_at_once_is_not_lost() -> None:
    """It may come before `ask` returns."""

    def send(rank: int, payload: bytes) -> None:
        calls.hear(rank, answer_to(0, lambda: rank + 1))

    calls = Calls(send)
    assert calls.ask(6, "verb").result(0) == 7


def test_calls_end_with_the_gang_also_those_that_come_later() -> None:
    calls = Calls(lambda *_: None)
    before = calls.ask(1, "verb")
    calls.fail(RuntimeError("lost"))
    for answer in (before, calls.ask(1, "verb")):
        with pytest.raises(RuntimeError, match="lost"):
            answer.result(0)


def test_a_rank_that_cannot_says_why() -> None:
    calls = Calls(lambda *_: None)
    asked = calls.ask(1, "verb")

    def refuse() -> None:
        raise TimeoutError

    calls.hear(1, answer_to(0, refuse))
    with pytest.raises(OSError, match="TimeoutError"):
        asked.result(0)


@pytest.mark.parametrize(
    ("kv_host", "own_host", "listens", "advertised"),
    [
        ("10.0.0.1", None, "10.0.0.1", None),
        ("10.0.0.1", OwnHost("10.0.0.2", "10.0.0.2"), "10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", OwnHost("10.0.0.2", "pod-0-1.pods"), "10.0.0.2", "pod-0-1.pods"),
        ("0.0.0.0", OwnHost("10.0.0.2", "pod-0-1.pods"), "0.0.0.0", "pod-0-1.pods"),
    ],
)
def test_each_rank_is_reached_for_kv_blocks_at_its_host(
    kv_host, own_host, listens, advertised
) -> None:
    config = TransferConfig(kv_host=kv_host, cluster_token="t", kv_tcp_port=7000)
    of_rank = config_of(config, 3, own_host)
    assert (of_rank.kv_host, of_rank.kv_advertised_host) == (listens, advertised)
    assert (of_rank.kv_tcp_port, of_rank.kv_grpc_port) == (7003, 0)


def test_a_rank_that_is_gone_before_its_welcome_was_lost(clusters) -> None:
    """And has refused nothing: whoever supervises the engine starts it again."""
    channel, other = connect(clusters["plain"], clusters["plain"])
    watch = Watch([Member(1, node=Node(1), channel=channel)], [], lambda *_: None)
    gang = Gang(watch, Calls(lambda *_: None), "127.0.0.1")
    channel.close()
    with pytest.raises(RankFailed, match=r"rank 1 .*closed its connection"):
        gang.join()
    gang.close()
    other.close()
