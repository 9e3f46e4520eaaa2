"""What is shown while a worker starts."""

import io
import logging

import pytest

from quire.cli.startup import LogLines, TerminalLine, describe, display_for
from quire.proto import worker_pb2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"phase": "resolve", "detail": "demo"}, "resolve: demo (3 s)"),
        (
            {"phase": "load", "done": 1_200_000_000, "total": 2_000_000_000, "unit": "bytes"},
            "load 60% 1.2/2.0 GB (3 s)",
        ),
        (
            {"phase": "load", "done": 1_000_000, "total": 4_000_000, "unit": "bytes"},
            "load 25% 1.0/4.0 MB (3 s)",
        ),
        ({"phase": "load", "done": 1, "total": 3, "unit": "shards"}, "load 33% 1/3 shards (3 s)"),
        ({}, "start (3 s)"),
    ],
)
def test_a_phase_as_text(fields, text):
    assert describe(worker_pb2.Startup(**fields), 3.2) == text


def test_a_terminal_gets_one_line_that_is_cleared_at_the_end():
    stream = io.StringIO()
    line = TerminalLine(stream)
    line.show("load 1%")
    line.show("load 2%")
    line.done()
    assert stream.getvalue() == "\r\x1b[Kload 1%\r\x1b[Kload 2%\r\x1b[K"


def test_logs_get_a_line_per_phase_and_one_every_few_seconds(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("quire.cli.startup.time.monotonic", lambda: now[0])
    lines = LogLines()
    with caplog.at_level(logging.INFO, logger="quire.cli.startup"):
        for text, after in (("load 1%", 0), ("load 2%", 1), ("load 9%", 5), ("profile", 0.1)):
            now[0] += after
            lines.show(text)
    shown = [r.getMessage() for r in caplog.records]
    assert shown == ["start-up: load 1%", "start-up: load 9%", "start-up: profile"]


def test_the_display_fits_the_stream():
    assert isinstance(display_for(io.StringIO()), LogLines)
