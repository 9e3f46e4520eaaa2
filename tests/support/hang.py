"""Stops one thread of another process, as a hung engine is: the rest of the process goes on."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import contextmanager
from pathlib import Path

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000  # os.WALL, which Python does not name


def busiest_thread(pid: int, seconds: float = 1.0) -> int:
    """The thread, other than the first, that computes most for a while from now on."""

    def ticks() -> dict[str, int]:
        found = {}
        for thread in Path(f"/proc/{pid}/task").iterdir():
            fields = (thread / "stat").read_text().rpartition(")")[2].split()
            found[thread.name] = int(fields[11]) + int(fields[12])
        return found

    before = ticks()
    time.sleep(seconds)
    spent = {name: count - before.get(name, 0) for name, count in ticks().items()}
    del spent[str(pid)]
    return int(max(spent, key=lambda name: spent[name]))


@contextmanager
def hung(tid: int):
    """The thread does not run. Enter and leave on the same thread of this process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def ptrace(request: int) -> None:
        if libc.ptrace(request, tid, None, None) < 0:
            raise OSError(ctypes.get_errno(), f"ptrace {request}")

    ptrace(PTRACE_SEIZE)
    ptrace(PTRACE_INTERRUPT)
    os.waitpid(tid, WALL)
    try:
        yield
    finally:
        try:
            ptrace(PTRACE_DETACH)
        except ProcessLookupError:  # killed meanwhile: its parent hears of it only now
            os.waitpid(tid, WALL)
