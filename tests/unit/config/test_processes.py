"""Options of the processes of a cluster: addresses, tokens, names."""

from __future__ import annotations

import pytest

from quire.config.address import host_of, is_local, named_address, split_address
from quire.config.cluster import ClusterConfig
from quire.config.gateway import UpstreamConfig
from quire.config.router import RouterServerConfig
from quire.config.serve import LocalConfig
from quire.config.worker import WorkerConfig


@pytest.mark.parametrize(
    ("address", "host", "local"),
    [
        ("127.0.0.1:9000", "127.0.0.1", True),
        ("localhost:1", "localhost", True),
        ("[::1]:9000", "::1", True),
        ("unix:/run/q.sock", None, True),
        ("0.0.0.0:9000", "0.0.0.0", False),
        ("[::]:9000", "::", False),
        ("pod-0.quire:9000", "pod-0.quire", False),
    ],
)
def test_an_address_says_who_can_reach_it(address, host, local):
    assert host_of(address) == host
    assert is_local(address) is local


@pytest.mark.parametrize("address", ["", "9000", ":9000", "host:", "host:x", "::1:9000", "a:70000"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)


def test_names_are_optional():
    assert named_address("a=h:1") == ("a", "h:1")
    assert named_address("h:1") == ("h:1", "h:1")
    with pytest.raises(ValueError, match="name is missing"):
        named_address("=h:1")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: UpstreamConfig(), "at least one address"),
        (lambda: UpstreamConfig(worker=("a=h:1", "a=h:2")), "same name"),
        (lambda: UpstreamConfig(worker=("h:1",), router=("nonsense",)), "host:port"),
        (lambda: RouterServerConfig(pod=("h:1", "h:1")), "same name"),
        (lambda: RouterServerConfig(listen="9100"), "listen: "),
        (lambda: RouterServerConfig(http_port=70000), "http_port"),
        (lambda: WorkerConfig(listen="unix:"), "path"),
        (lambda: WorkerConfig(advertise="here"), "host:port"),
        (lambda: WorkerConfig(role="boss"), "role"),
        (lambda: LocalConfig(decode=1), "need --prefill"),
        (lambda: LocalConfig(routers=-1), "routers"),
        (lambda: ClusterConfig(cluster_token=""), "cluster_token"),
        (lambda: ClusterConfig(cluster_token="secret\n"), "cluster_token"),
        (lambda: ClusterConfig(cluster_tls_cert="c"), "go together"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_roles_of_local_workers():
    assert LocalConfig(replicas=2).roles == ["both", "both"]
    assert LocalConfig(prefill=1).roles == ["prefill", "decode"]
    assert LocalConfig(prefill=1, decode=2).roles == ["prefill", "decode", "decode"]
