"""`quire role POD ROLE`: another role for one pod, without a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.cli.fleet_client import OWNERS, ask, split_words
from quire.config.flags import Command, UsageError
from quire.config.values import did_you_mean
from quire.config.worker import ROLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.coordinator.client import CoordinatorClient

COMMAND = Command(
    prog="quire role",
    summary="Change what a pod is for: quire role decode-0 prefill. Its cache stays.",
    owners=OWNERS,
    reads_environment=True,
)


def run(argv: Sequence[str]) -> int:
    """Tell the coordinator; returns the exit code."""
    words, flags = split_words(argv)
    if len(words) != 2 and not any(flag in ("-h", "--help") for flag in flags):
        raise UsageError(COMMAND.prog, "a pod and a role are needed: quire role POD ROLE")
    pod, role = words or ("", "")
    if words and role not in ROLES:
        hint = did_you_mean(role, ROLES)
        raise UsageError(COMMAND.prog, f"a role is one of {', '.join(ROLES)}, not {role!r}{hint}")

    async def change(client: CoordinatorClient) -> None:
        await client.set_role(pod, role)
        print(f"{pod}: {role}")

    return ask(COMMAND, flags, change)
