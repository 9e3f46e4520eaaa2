"""How a process says with its exit code whether another attempt is of use."""

from __future__ import annotations

import os

CANNOT_SERVE = 2
"""It has said what its caller must change; the next attempt would say the same."""
TRY_LATER = os.EX_TEMPFAIL
"""It has said what keeps it, which may pass by itself: the network, the hub, a port, a disk."""
_LASTING = (
    ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError,
)  # fmt: skip


def exit_code(error: ValueError | OSError) -> int:
    """Of a process that cannot serve because of `error`."""
    return CANNOT_SERVE if isinstance(error, _LASTING) else TRY_LATER
