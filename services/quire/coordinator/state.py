"""What a coordinator's successor must know, in a folder that one coordinator uses at a time."""

from __future__ import annotations

import fcntl
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from quire.coordinator import files
from quire.coordinator.topology import Epoch, Pod, Topology

if TYPE_CHECKING:
    from pathlib import Path

RECORD, LOCK = "state.json", "lock"


class StateError(Exception):
    """The folder cannot be used; the message says why."""


@dataclass(frozen=True)
class Record:
    """Decisions of people, and where pods were last."""

    replicas: dict[str, int] = field(default_factory=dict)
    """Pool -> number, where it was changed by `quire scale`."""
    roles: dict[str, str] = field(default_factory=dict)
    """Pod -> role, where it was changed by `quire role`."""
    hosts: dict[str, str] = field(default_factory=dict)
    """Pod -> host on which its engine was seen."""
    topology: Topology | None = None


class StateFolder:
    """Open from its construction until `close`. Raises StateError when it is taken."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("a+")
        except OSError as error:
            raise StateError(f"cannot use {folder}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise StateError(
                f"another coordinator (process {owner}) uses {folder}: end that one, or give this "
                "one another fleet name"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def close(self) -> None:
        """Let another coordinator have it."""
        self._lock.close()

    def read(self) -> Record:
        """What was written last; nothing when this is new. Raises StateError."""
        if not self._path.exists():
            return Record()
        raw = files.read_json(self._path)
        try:
            told = raw.pop("topology")
            topology = told and Topology(
                told["fleet"], Epoch(*told["epoch"]), tuple(Pod(**pod) for pod in told["pods"])
            )
            return Record(topology=topology, **raw)
        except (KeyError, TypeError, AttributeError):
            raise StateError(
                f"{self._path} is damaged: remove it; what runs is found again, changes by "
                "`quire scale` and `quire role` are lost"
            ) from None

    def write(self, record: Record) -> None:
        """Replace what was written. Raises OSError."""
        files.write_json(self._path, asdict(record))
