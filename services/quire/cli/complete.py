"""`quire complete PROMPT`: what a model on a running server goes on with after a prompt."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.cli.remote import Remote, RemoteConfig, RemoteError, fail, show
from quire.config.base import check_fields
from quire.config.flags import Command, UsageError, parse
from quire.config.option import option

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class CompleteConfig:
    """What to complete."""

    prompt: str | None = option(None, "prompt", aliases=("quick", "-q"))
    """Text to go on from; read from stdin when not given."""

    def __post_init__(self) -> None:
        check_fields(self)


COMMAND = Command(
    prog="quire complete",
    summary="Complete one prompt on a running server.",
    owners=(CompleteConfig, RemoteConfig),
    positional="prompt",
)


def run(argv: Sequence[str]) -> int:
    """Print the completion as it comes; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    prompt = resolved.get(CompleteConfig).prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError(COMMAND.prog, "a prompt is needed, as argument or on stdin")
        prompt = sys.stdin.read()
    try:
        with Remote(resolved.get(RemoteConfig)) as remote:
            show(remote.stream_completion(prompt))
    except RemoteError as error:
        return fail(COMMAND.prog, error)
    return 0
