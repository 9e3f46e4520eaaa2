"""Holds a transfer of this process where a test wants it, and says that it is there.

Each state of a transfer's machine is a gate, passed when the machine enters it and before anything
that the transition asks for is done, and so are two moments within a state:

    sender    opening, sending, flowing (pieces are taken to be written), committing, draining,
              done, failed
    receiver  promised, receiving, flowing (a block is in the pool), draining, committed, failed

A gate is shut by a file of its name, `sender-opening`, which the first transfer to come by takes
away, in whichever process. It says so in the file `reached`, and then, by the gate file's content:
`STOP` or `KILL` this process is stopped or killed right there; `wait` it waits for the file `go`.

Where there is a file `damage`, one transfer takes it away and receives its first pieces damaged,
as often as they are sent: the transfer fails.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.transfer.receiving import ReceivingTransfer
    from quire.transfer.sending import SendingTransfer

LONGEST_WAIT_S = 5.0
"""For a test that has gone wrong."""


def gate_sender(machine: type[SendingTransfer], folder: str) -> None:
    """Gates before every state of every sender."""
    gates, take = _Gates(Path(folder), "sender"), machine.take

    def taking(self: Any, *limits: int) -> Any:
        if taken := take(self, *limits):
            gates.pass_by(self, "flowing")
        return taken

    machine.take = taking
    machine.state = _Gated(gates)


def gate_receiver(machine: type[ReceivingTransfer], folder: str) -> None:
    """Gates before every state of every receiver."""
    gates, landed, stored = _Gates(Path(folder), "receiver"), machine.landed, machine.stored
    damaged: set[int] = set()

    def landing(self: Any, rank: int, entry: Any, good: bool, now: float) -> Any:
        if gates.take("damage") is not None:
            damaged.add(self.ref.transfer)
        return landed(self, rank, entry, good and self.ref.transfer not in damaged, now)

    def storing(self: Any, *what: Any) -> Any:
        effects = stored(self, *what)
        gates.pass_by(self, "flowing")
        return effects

    machine.landed = landing
    machine.stored = storing
    machine.state = _Gated(gates)


class _Gated:
    """The attribute `state` of a machine."""

    def __init__(self, gates: _Gates) -> None:
        self._gates = gates

    def __get__(self, machine: Any, owner: type) -> Any:
        return machine.__dict__["state"]

    def __set__(self, machine: Any, state: str) -> None:
        is_new = machine.__dict__.get("state") != state
        machine.__dict__["state"] = state
        if is_new:
            self._gates.pass_by(machine, state)


class _Gates:
    """Those of one side."""

    def __init__(self, folder: Path, side: str) -> None:
        self._folder, self._side = folder, side

    def take(self, name: str) -> str | None:
        """A file's content, for the one who takes it away."""
        mine = self._folder / f"{name}.{os.getpid()}"
        try:
            (self._folder / name).rename(mine)
        except FileNotFoundError:
            return None
        return mine.read_text()

    def pass_by(self, machine: Any, state: str) -> None:
        """Stay here if the gate is shut."""
        order = self.take(f"{self._side}-{state}")
        if order is None:
            return
        said = json.dumps({"pid": os.getpid(), "ref": machine.ref})
        written = self._folder / f"reached.{os.getpid()}"
        written.write_text(said)
        written.rename(self._folder / "reached")
        if order == "wait":
            self._wait()
        else:  # to this thread: it goes not one instruction further
            signal.pthread_kill(threading.get_ident(), signal.Signals[f"SIG{order}"])

    def _wait(self) -> None:
        deadline = time.monotonic() + LONGEST_WAIT_S
        while not (self._folder / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
