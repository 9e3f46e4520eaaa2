"""The listening socket, and what is said when there is none."""

import socket
import stat

import pytest

from quire.cli.listen import ListenError, closing, listen
from quire.config.gateway import GatewayConfig


def test_port_0_becomes_the_port_that_was_bound():
    sock, config = listen(GatewayConfig(port=0))
    with sock:
        assert config.port == sock.getsockname()[1] > 0
        with socket.create_connection(("127.0.0.1", config.port)):
            pass


def test_a_taken_port_is_explained():
    sock, config = listen(GatewayConfig(port=0))
    with sock, pytest.raises(ListenError) as caught:
        listen(config)
    assert f"127.0.0.1:{config.port}" in str(caught.value)
    assert "--port" in str(caught.value)


def test_an_unknown_host_is_explained():
    config = GatewayConfig(host="no.such.host.invalid", allow_unauthenticated=True)
    with pytest.raises(ListenError, match=r"no\.such\.host\.invalid"):
        listen(config)


def test_a_unix_socket_left_behind_is_replaced_and_a_live_one_is_not(tmp_path):
    config = GatewayConfig(uds=str(tmp_path / "q.sock"))
    sock, _ = listen(config)
    with pytest.raises(ListenError, match=r"in use"):
        listen(config)
    sock.close()
    sock, _ = listen(config)
    with closing(config, sock):
        assert stat.S_ISSOCK((tmp_path / "q.sock").stat().st_mode)
    assert not (tmp_path / "q.sock").exists()


def test_a_file_is_never_replaced_by_a_socket(tmp_path):
    path = tmp_path / "data"
    path.write_text("precious")
    with pytest.raises(ListenError):
        listen(GatewayConfig(uds=str(path)))
    assert path.read_text() == "precious"
