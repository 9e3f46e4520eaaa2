"""What Ray says when it cannot be joined, in words that say what to change."""

from __future__ import annotations

import pytest

from quire.coordinator.joining import why_not_connected


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        (
            "10.0.0.1:6379",
            RuntimeError(
                "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: "
                "3.11.7\nThis process on node 10.0.0.2 was started with:\n    Ray: 2.60.0"
            ),
            "install the same ray and Python on every node",
        ),
        ("auto", ConnectionError("Could not find any running Ray instance."), "`ray start`"),
        (
            "10.0.0.1:6379",
            RuntimeError("No node info found matching attributes: '10.0.0.2' when trying to ..."),
            "`ray start --address=10.0.0.1:6379 --num-cpus=0`",
        ),
        ("10.0.0.1:6379", ConnectionError("timed out"), "can be reached at 10.0.0.1:6379"),
    ],
)
def test_each_failure_names_what_to_change(address, error, said):
    assert said in why_not_connected(address, error)
