"""A coordinator whose port somebody else has: what to change is said, nothing of Ray is started."""

from __future__ import annotations

import re
import socket

import pytest
from waiting import LIMIT_S

from quire.config.exit_codes import CANNOT_SERVE
from quire.config.fleet import fleet_from
from quire.coordinator import server
from quire.coordinator.placement import RayCluster


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("listen", "cannot listen on 127.0.0.1:{}: .* give the fleet another address as listen"),
        (
            "http_port",
            "port {} of 127.0.0.1 cannot be listened on .* give another http-port",
        ),
    ],
)
async def test_a_port_that_is_taken_is_named(tmp_path, capfd, monkeypatch, field, said) -> None:
    async def connect(self) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr(RayCluster, "connect", connect)
    monkeypatch.setattr(RayCluster, "disconnect", lambda self: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = {
            "listen": "127.0.0.1:0",
            field: port if field == "http_port" else f"127.0.0.1:{port}",
        }
        models = [{"name": "m", "pools": [{"name": "p"}]}]
        fleet = fleet_from(where | {"state_dir": str(tmp_path), "models": models})

        async def never() -> None:
            raise AssertionError("it went on")

        code = await server.serve(fleet, ended=never, ends_with_fleet=False)
    assert code == CANNOT_SERVE

    assert re.search(said.format(port), capfd.readouterr().err)
