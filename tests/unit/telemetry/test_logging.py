"""Log records: one line each, in text or JSON, with the request's id."""

import asyncio
import json
import logging
import sys

import pytest

from quire.telemetry.logging import (
    JsonFormatter,
    TextFormatter,
    configure,
    current_request_id,
    request_context,
)


def record(message, *args, exc_info=None):
    return logging.LogRecord("quire.test", logging.INFO, "f.py", 1, message, args, exc_info)


@pytest.fixture
def root_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def failure():
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError:
        return sys.exc_info()


def test_text_is_one_line_even_when_the_caller_sends_line_breaks():
    line = TextFormatter().format(record("name %s", "evil\n2026 INFO forged", exc_info=failure()))
    assert "\n" not in line
    assert "INFO quire.test: name evil\\n2026 INFO forged" in line
    assert "RuntimeError" in line


def test_json_has_the_fields_log_collectors_expect():
    with request_context("abc"):
        entry = json.loads(JsonFormatter().format(record("took %d", 3, exc_info=failure())))
    assert entry["level"] == "info"
    assert entry["message"] == "took 3"
    assert entry["logger"] == "quire.test"
    assert entry["request_id"] == "abc"
    assert "RuntimeError" in entry["exception"]


async def test_the_request_id_follows_tasks_and_does_not_leak_between_them():
    async def one(name):
        with request_context(name):
            await asyncio.sleep(0)
            return TextFormatter().format(record("x")), current_request_id()

    lines = await asyncio.gather(one("a"), one("b"))
    assert [i for _, i in lines] == ["a", "b"]
    assert lines[0][0].endswith("(request=a)")
    assert current_request_id() is None
    assert "(request" not in TextFormatter().format(record("x"))


def test_set_up_writes_to_stderr_once(root_logging, capsys):
    configure("info")
    configure("info", "json")
    logging.getLogger("quire.x").info("hello %s", "you")
    logging.getLogger("quire.x").debug("hidden")
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["hello you"]


def test_an_unknown_level_is_an_error(root_logging):
    with pytest.raises(ValueError, match="LOUD"):
        configure("loud")
