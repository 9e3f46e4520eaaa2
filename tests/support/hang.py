"""Stops one thread of another process, as a hung engine is: the rest of the process goes on."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000  # os.WALL, which Python does not name


def busiest_thread(pid: int) -> int:
    """The thread, other than the first, that has computed most."""

    def ticks(thread: Path) -> int:
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    threads = [t for t in Path(f"/proc/{pid}/task").iterdir() if t.name != str(pid)]
    return int(max(threads, key=ticks).name)


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
        ptrace(PTRACE_DETACH)
