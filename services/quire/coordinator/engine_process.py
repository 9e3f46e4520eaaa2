"""An engine as a process of its own: started, found again, ended. See `keeper`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.config.exit_codes import CANNOT_SERVE, TRY_LATER
from quire.config.last_word import last_word
from quire.coordinator import files
from quire.coordinator.files import Identity

if TYPE_CHECKING:
    from pathlib import Path

START_S = 20.0
"""For the keeper to start the engine's process, on a busy machine."""
EXIT_REPORT_S = 2.0
"""For the keeper to write how the engine ended."""
POLL_S = 0.02
_KEPT_VARIABLES = ("QUIRE_CPU_ISA",)
_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Engine:
    """A process that was started, and what it was started with."""

    process: Identity
    keeper: Identity
    address: str
    digest: str
    gpus: str | None
    """Devices it sees."""
    master: str = ""
    """Where rank 0 meets the ranks of other hosts, if there are any."""
    leader: int = 0
    """Process of rank 0 that it was started beside, where that is on another host; 0: not known."""

    @property
    def is_alive(self) -> bool:
        """It runs."""
        return files.is_alive(self.process)


@dataclass(frozen=True)
class Launch:
    """What to start."""

    options: dict[str, Any]
    """Of `quire worker`; they go into a file that only this user can read."""
    address: str
    digest: str
    token: str | None
    orphan_s: float
    gpus: str | None
    """Devices it shall see; None for those that this process sees."""
    master: str = ""
    """See `Engine`."""
    leader: int = 0
    """See `Engine`."""


@dataclass(frozen=True)
class Exit:
    """How an engine ended."""

    code: int | None
    """Negative for a signal, None when nobody knows."""
    last_lines: tuple[str, ...] = ()

    @property
    def is_refusal(self) -> bool:
        """The engine has said why it cannot serve with its options."""
        return self.code == CANNOT_SERVE and bool(self.last_lines)

    @property
    def reason(self) -> str:
        """One line for people: what the engine said last when it ended by itself."""
        if self.code in (CANNOT_SERVE, TRY_LATER) and self.last_lines:
            return last_word(self.last_lines)
        if self.code is not None and self.code < 0:
            return f"the engine was killed by {_signal_name(-self.code)}"
        said = f": {last_word(self.last_lines)}" if self.last_lines and self.code else ""
        return f"the engine ended (exit code {'unknown' if self.code is None else self.code}){said}"


def find(folder: Path) -> Engine | None:
    """The engine that runs from this folder, if one does."""
    about = files.read_json(folder / files.ENGINE)
    if about is None:
        return None
    engine = Engine(
        Identity(*about["engine"]),
        Identity(*about["keeper"]),
        about["address"],
        about["digest"],
        about["gpus"],
        about.get("master", ""),
        about.get("leader", 0),
    )
    return engine if engine.is_alive else None


def start(folder: Path, launch: Launch) -> Engine:
    """Start an engine that outlives this process. None may run from this folder.

    Raises OSError when it cannot be started.
    """
    for name in (files.ENGINE, files.EXIT):
        (folder / name).unlink(missing_ok=True)
    files.renew_lease(folder)
    options = folder / "options.json"
    files.write_json(options, launch.options)
    gpus = launch.gpus if launch.gpus is not None else os.environ.get(_GPUS)
    files.write_json(
        folder / files.LAUNCH,
        {
            "command": [sys.executable, "-P", "-m", "quire", "worker", "--config", str(options)],
            "orphan_s": launch.orphan_s,
            "facts": {
                "address": launch.address,
                "digest": launch.digest,
                "gpus": gpus,
                "master": launch.master,
                "leader": launch.leader,
            },
        },
    )
    keeper = subprocess.run(
        [sys.executable, "-P", "-m", "quire.coordinator.keeper", str(folder)],
        env=_environment(launch.token, gpus),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        timeout=START_S,
        check=False,
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        engine = find(folder)
        if engine is not None:
            return engine
        if (folder / files.EXIT).exists():
            break
        time.sleep(POLL_S)
    raise OSError(f"the engine's keeper did not start it (exit code {keeper.returncode})")


def exit_of(folder: Path, engine: Engine) -> Exit:
    """How an engine that runs no more has ended."""
    deadline = time.monotonic() + EXIT_REPORT_S
    while time.monotonic() < deadline:
        about = files.read_json(folder / files.EXIT)
        if about is not None and about["pid"] == engine.process.pid:
            return Exit(about["code"], tuple(about["last_lines"]))
        if not files.is_alive(engine.keeper):
            break
        time.sleep(POLL_S)
    return Exit(None)


def drain(engine: Engine) -> None:
    """Have it send its requests elsewhere, then end."""
    files.signal_process(engine.process, signal.SIGTERM)


def kill(engine: Engine) -> None:
    """End it now."""
    files.signal_process(engine.process, signal.SIGKILL)


def free_port(host: str, wanted: int) -> int:
    """A port that can be listened on at this moment. Raises OSError naming what is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, wanted), family=family) as sock:
            return int(sock.getsockname()[1])
    except OSError as error:
        raise OSError(
            f"port {wanted} of {host} cannot be listened on ({os.strerror(error.errno or 0)}): "
            "give the pool another port, or 0 for any free one"
        ) from None


def _environment(token: str | None, gpus: str | None) -> dict[str, str]:
    """Of the engine: this process's, without what Ray and other commands' options put there."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("QUIRE_", "RAY_")) or name in _KEPT_VARIABLES
    }
    kept.pop("OMP_NUM_THREADS", None)  # Ray's guess; the engine's own option says it
    if gpus is not None:
        kept[_GPUS] = gpus
    return kept if token is None else kept | {"QUIRE_CLUSTER_TOKEN": token}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
