"""`python -m quire.coordinator.keeper FOLDER`: the parent of one engine process.

It belongs to no one: a session of its own, no parent but init. So the engine outlives the Ray actor
and the raylet that started it, and the next actor finds here what runs, or how it ended.

    launch.json -> engine runs -> exit.json
                     │ lease older than `orphan_s`: SIGTERM, which drains it
    the keeper dies: the engine is told to drain and end too

Standard library only: one of these runs beside every engine.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.coordinator import files

if TYPE_CHECKING:
    from typing import IO

POLL_S = 0.2
KILL_AFTER_S = 60.0
"""For an orphaned engine to drain."""
MAX_LOG_BYTES = 8 << 20
LAST_LINES = 8
_PR_SET_PDEATHSIG = 1


def main(folder: Path) -> int:
    """Become an orphan, run the engine to its end."""
    if os.fork():
        os._exit(0)  # whoever started this need not wait for it
    launch = files.read_json(folder / files.LAUNCH)
    keeper = os.getpid()
    process = subprocess.Popen(
        launch["command"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: _end_with(keeper),  # safe: no other thread runs here yet
    )
    assert process.stdout is not None
    about = {"keeper": files.identity(keeper), "engine": files.identity(process.pid)}
    files.write_json(folder / files.ENGINE, launch["facts"] | about)
    last: deque[str] = deque(maxlen=LAST_LINES)
    writer = threading.Thread(target=_log, args=(process.stdout, folder / files.LOG, last))
    writer.start()
    code = _wait(process, folder, launch["orphan_s"])
    writer.join(POLL_S)
    files.write_json(
        folder / files.EXIT, {"pid": process.pid, "code": code, "last_lines": list(last)}
    )
    return 0


def _wait(process: subprocess.Popen[bytes], folder: Path, orphan_s: float) -> int:
    """The engine's exit code; ends it when nobody renews the lease."""
    limit = math.inf
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            age = files.lease_age_s(folder)
        if age < orphan_s:
            limit = math.inf
        elif limit == math.inf:
            process.terminate()
            limit = age + KILL_AFTER_S
        elif age > limit:
            process.kill()


def _log(stream: IO[bytes], path: Path, last: deque[str]) -> None:
    """Copy lines to a file of bounded size. Ends with the engine."""
    file: Any = path.open("ab")
    for line in stream:
        last.append(line.decode(errors="replace").rstrip())
        if file.tell() + len(line) > MAX_LOG_BYTES:
            file.close()
            path.replace(path.with_name(f"{path.name}.1"))
            file = path.open("ab")
        file.write(line)
        file.flush()
    file.close()


def _end_with(keeper: int) -> None:
    """In the engine before it runs: be told to drain when the keeper dies, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != keeper:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
