"""One line per log record, as text or JSON, with the request's id when there is one.

Modules log through `logging.getLogger(__name__)` with % arguments. Secrets, prompts and answers are
not logged; what a caller sent is shortened before it reaches a message.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Format = Literal["text", "json"]

_request_id: ContextVar[str | None] = ContextVar("quire_request_id", default=None)


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Log records of this task, and of tasks started from it, carry the request's id."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def current_request_id() -> str | None:
    """The id set by the enclosing `request_context`."""
    return _request_id.get()


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO quire.worker: message (request=abc)`, always one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line; line breaks, also those of a traceback, are written as \\n."""
        text = f"{_time(record)} {record.levelname} {record.name}: {_message(record)}"
        request_id = _request_id.get()
        return f"{text} (request={_one_line(request_id)})" if request_id else text


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, process, and request_id if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        request_id = _request_id.get()
        if request_id:
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure(level: str = "info", style: Format = "text") -> None:
    """Send every log record of the process to stderr. Replaces earlier handlers.

    Raises ValueError on an unknown level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # These log each request at info; ours say the same once, with the request's id.
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(record.msecs):03d}Z"


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    return _one_line(text)


def _one_line(text: str) -> str:
    """A caller cannot forge a second record through a line break in what it sends."""
    return text.replace("\r", "\\r").replace("\n", "\\n")
