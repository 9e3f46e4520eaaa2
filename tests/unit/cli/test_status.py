"""What `quire status` prints."""

from __future__ import annotations

import pytest

from quire.cli.status import describe
from quire.proto import coordinator_pb2


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://10.0.0.1:8265", "ray dashboard: http://10.0.0.1:8265"),
        ("", "ray dashboard: off (it needs ray[default] and a head started with it)"),
    ],
)
def test_the_dashboard_is_named_or_why_there_is_none(url: str, line: str) -> None:
    assert line in list(describe(coordinator_pb2.FleetStatus(fleet="f", dashboard_url=url)))
