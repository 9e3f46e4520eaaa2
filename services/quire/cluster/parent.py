"""Processes that must not outlive the one that started them: their stdin ends with it."""

from __future__ import annotations

import asyncio
import sys


async def parent_gone() -> None:
    """Return when stdin ends: the process that started this one is gone."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    while await reader.read(4096):
        pass
