"""Where pods are found."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


class Discovery(Protocol):
    """Tells which pods there should be."""

    def watch(self) -> AsyncIterator[Mapping[str, str]]:
        """All pods, id -> gRPC address, now and after each change; does not end by itself."""


class StaticPods:
    """A list given once; `set` changes it."""

    def __init__(self, pods: Mapping[str, str]) -> None:
        self._pods = dict(pods)
        self._changed = asyncio.Event()

    def set(self, pods: Mapping[str, str]) -> None:
        """These are the pods from now on."""
        self._pods = dict(pods)
        self._changed.set()

    async def watch(self) -> AsyncIterator[Mapping[str, str]]:
        """The list, and again when it was set."""
        while True:
            self._changed.clear()
            yield dict(self._pods)
            await self._changed.wait()
