"""`quire up -f fleet.yaml`: the coordinator of a fleet on Ray."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire.cli.standalone import never, run_alone
from quire.config.base import check_fields
from quire.config.flags import Command, UsageError, parse
from quire.config.fleet import read_fleet
from quire.config.logs import LogConfig
from quire.config.option import option
from quire.config.transfer import TransferConfig
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class UpConfig:
    """What to bring up."""

    fleet_file: str = option("fleet.yaml", "fleet", aliases=("-f",))
    """YAML file of the fleet: its models, their pools and replicas; see docs/coordinator.md."""

    fleet_name: str | None = option(None, "fleet")
    """Name of the fleet in place of the file's, where several are made from one file."""

    def __post_init__(self) -> None:
        check_fields(self)


COMMAND = Command(
    prog="quire up",
    summary="Keep a fleet of engine replicas running on Ray.",
    owners=(UpConfig, TransferConfig, LogConfig),
    reads_environment=True,
    epilog="Ctrl-C ends the fleet; SIGTERM leaves it running for the next coordinator.",
)


def run(argv: Sequence[str]) -> int:
    """Coordinate until a signal; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    require_ray(COMMAND)
    config = resolved.get(UpConfig)
    try:
        fleet = read_fleet(Path(config.fleet_file), resolved.get(TransferConfig), config.fleet_name)
    except ConfigError as error:
        raise UsageError(COMMAND.prog, str(error)) from None

    async def serve() -> int:
        from quire.coordinator.joining import prepare_environment

        prepare_environment()
        from quire.coordinator.server import serve

        return await serve(fleet, ended=never, ends_with_fleet=False)

    code = run_alone(resolved.get(LogConfig), serve())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for Ray's head would keep the interpreter


def require_ray(command: Command) -> None:
    """Raises UsageError when Ray is not installed. Does not import it."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise UsageError(command.prog, "Ray is not installed: pip install 'quire[coordinator]'")
