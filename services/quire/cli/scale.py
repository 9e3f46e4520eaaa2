"""`quire scale POOL=N ...`: another number of replicas while the fleet runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.cli.fleet_client import OWNERS, ask, split_words
from quire.config.flags import Command, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.coordinator.client import CoordinatorClient

COMMAND = Command(
    prog="quire scale",
    summary="Change how many replicas pools have: quire scale prefill=3 decode=2.",
    owners=OWNERS,
    reads_environment=True,
)


def run(argv: Sequence[str]) -> int:
    """Tell the coordinator; returns the exit code."""
    words, flags = split_words(argv)
    if not words and not any(flag in ("-h", "--help") for flag in flags):
        raise UsageError(COMMAND.prog, "which pool? quire scale POOL=N ...")
    replicas = dict(_parse(word) for word in words)

    async def scale(client: CoordinatorClient) -> None:
        await client.scale(replicas)
        print("; ".join(f"{pool}: {number} replicas" for pool, number in replicas.items()))

    return ask(COMMAND, flags, scale)


def _parse(word: str) -> tuple[str, int]:
    pool, equals, number = word.partition("=")
    if not (pool and equals and number.isdecimal()):
        raise UsageError(COMMAND.prog, f"POOL=N is needed, such as prefill=3, not {word!r}")
    return pool, int(number)
