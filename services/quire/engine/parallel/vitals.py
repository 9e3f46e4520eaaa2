"""What a rank says of itself with each sign of life."""

from __future__ import annotations

import os
import struct
from dataclasses import astuple, dataclass
from pathlib import Path

_VITALS = struct.Struct("<3Q")


@dataclass
class Vitals:
    """Counts of one rank."""

    steps: int = 0
    """That it has executed."""
    host_bytes: int = 0
    """Resident memory of its process."""
    device_bytes: int = 0
    """Of a GPU, once loaded."""

    def pack(self) -> bytes:
        """As `unpack` reads it."""
        return _VITALS.pack(*astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Vitals:
        """Raises ValueError for what is none."""
        if len(data) != _VITALS.size:
            raise ValueError(f"{len(data)} bytes are no vitals")
        return cls(*_VITALS.unpack(data))


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
