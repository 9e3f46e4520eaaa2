"""What the engines of this host write to their log files, copied to where a pod's log goes."""

from __future__ import annotations

import os
from io import BytesIO
from typing import IO

from quire.coordinator import files

_NAMES = (f"{files.LOG}.1", files.LOG)
"""The older one first: a file that was being read becomes it."""


class EngineLogs:
    """From now on: what the files hold already was an earlier process's to copy."""

    def __init__(self, to: IO[bytes]) -> None:
        self._offsets: dict[int, int] = {}
        """Number of a file's inode -> what has been copied of it."""
        self._to: IO[bytes] = BytesIO()
        self.copy()
        self._to = to

    def copy(self) -> None:
        """Everything that is new."""
        for folder in files.engine_folders():
            for name in _NAMES:
                try:
                    with (folder / name).open("rb") as file:
                        inode = os.fstat(file.fileno()).st_ino
                        file.seek(self._offsets.get(inode, 0))
                        self._to.write(file.read())
                        self._offsets[inode] = file.tell()
                except FileNotFoundError:  # not written yet
                    continue
        self._to.flush()
