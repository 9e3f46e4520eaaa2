"""Waiting for what other threads and processes do."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 30.0
"""Only what has gone wrong takes longer, where nobody says otherwise."""
LONGEST_PAUSE_S = 0.1


def wait_until(
    condition: Callable[[], Any], what: str = "the condition", limit_s: float = LIMIT_S
) -> float:
    """Seconds until `condition` held. Raises AssertionError when it takes longer than the limit."""
    began = time.monotonic()
    for pause in _pauses(what, limit_s):
        if condition():
            break
        time.sleep(pause)
    return time.monotonic() - began


async def until(
    condition: Callable[[], Any], what: str = "the condition", limit_s: float = LIMIT_S
) -> None:
    """`wait_until`, for what happens on this event loop."""
    for pause in _pauses(what, limit_s):
        if condition():
            return
        await asyncio.sleep(pause)


def _pauses(what: str, limit_s: float) -> Iterator[float]:
    """Short ones first, for as long as the limit allows."""
    deadline, pause = time.monotonic() + limit_s, 0.002
    while time.monotonic() < deadline:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)
    raise AssertionError(f"did not happen within {limit_s:g} s: {what}")
