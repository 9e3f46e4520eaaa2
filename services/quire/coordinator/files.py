"""Small files in an engine's folder, and processes that stay the same. Standard library only.

launch.json   what the keeper shall start
engine.json   what it has started
exit.json     how that ended
lease         clock reading of the supervisor's last sign of life
engine.log    what the engine wrote, and engine.log.1 before that
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

LAUNCH, ENGINE, EXIT, LEASE, LOG = "launch.json", "engine.json", "exit.json", "lease", "engine.log"
_STAT_STATE, _STAT_STARTED = 0, 19
"""Fields of /proc/PID/stat behind the command's name."""


class Identity(NamedTuple):
    """A process, and not another one that later got its number."""

    pid: int
    started: int
    """Clock ticks after boot."""


def identity(pid: int) -> Identity | None:
    """Of a process that runs, None when there is none (or only its corpse)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if fields[_STAT_STATE] in ("Z", "X"):
        return None
    return Identity(pid, int(fields[_STAT_STARTED]))


def is_alive(process: Identity) -> bool:
    """It still runs."""
    return identity(process.pid) == process


def is_stopped(process: Identity) -> bool:
    """It runs, but a signal has stopped it."""
    try:
        text = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return False
    return is_alive(process) and text.rpartition(")")[2].split()[_STAT_STATE] == "T"


def signal_process(process: Identity, number: int) -> None:
    """Send a signal, unless it has ended."""
    if is_alive(process):
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            return


def resident_bytes(pid: int) -> int:
    """Memory of a process and of those that it started, 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return 0
    started = (int(child) for children in lists for child in children.split())
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident_bytes, started))


def engine_folder(fleet: str, pod: str, node: int = 0) -> Path:
    """This user's folder for an engine, or its part, on this host; made if it is missing.

    Raises OSError when it belongs to somebody else.
    """
    base = _base()
    base.mkdir(mode=0o700, exist_ok=True)
    about = base.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077 or base.is_symlink():
        raise OSError(f"{base} is open to others: remove it")
    folder = base / fleet / (f"{pod}.{node}" if node else pod)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def engine_folders() -> list[Path]:
    """Folders of all engines that were ever started by this user on this host."""
    return sorted(path.parent for path in _base().glob(f"*/*/{ENGINE}"))


def _base() -> Path:
    return Path(tempfile.gettempdir()) / f"quire-{os.getuid()}"


def write_json(path: Path, value: Any) -> None:
    """Replace a file at once, readable by this user alone; nobody sees half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)


def read_json(path: Path) -> Any:
    """Content of a file, None when it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def renew_lease(folder: Path) -> None:
    """A sign of life for the keeper. The clock is the same for all processes of a host."""
    new = folder / f".{LEASE}-{os.getpid()}"
    new.write_text(repr(time.monotonic()))
    new.replace(folder / LEASE)  # at once: an empty lease would look like an old one


def lease_age_s(folder: Path) -> float:
    """Since the last sign of life; infinite without one."""
    try:
        return time.monotonic() - float((folder / LEASE).read_text())
    except (OSError, ValueError):
        return float("inf")
