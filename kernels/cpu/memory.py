"""Large zeroed memory on huge pages, from csrc/cpu/memory.cpp."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from quire.kernels.cpu.library import load


def huge_array(num_bytes: int) -> np.ndarray:
    """Zeroed uint8 [num_bytes] on huge pages that appear when first touched.

    Unmapped when the array and all its views are gone. Raises MemoryError.
    """
    library = load()
    num_bytes = max(num_bytes, 1)
    address = library.quire_alloc(num_bytes)
    if address is None:
        raise MemoryError(f"cannot map {num_bytes} bytes")
    span = (ctypes.c_uint8 * num_bytes).from_address(address)
    finalizer = weakref.finalize(span, library.quire_free, address, num_bytes)
    finalizer.atexit = False  # the process gives it back anyway, and threads may still read
    array: np.ndarray = np.ctypeslib.as_array(span)
    return array


class Arena:
    """Memory handed out piece by piece from large spans, so that small pieces share huge pages."""

    CHUNK = 32 << 20

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)
        self.used = 0
        """Bytes handed out."""

    def take(self, num_bytes: int) -> np.ndarray:
        """Zeroed uint8 [num_bytes], aligned to 64 bytes. Raises MemoryError."""
        size = -(-num_bytes // 64) * 64
        if size > len(self._free):
            self._free = huge_array(max(size, self.CHUNK))
        piece, self._free = self._free[:num_bytes], self._free[size:]
        self.used += size
        return piece
