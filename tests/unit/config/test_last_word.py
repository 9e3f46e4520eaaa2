"""The line that says why a process of ours ended."""

from __future__ import annotations

import pytest

from quire.config.last_word import last_word


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], ""),
        (["a line", "RuntimeError: broken"], "RuntimeError: broken"),
        (["quire: error: no model", "ERROR grpc: ended", "CancelledError"], "no model"),
    ],
)
def test_the_line_that_says_why(lines, why):
    assert last_word(lines) == why
