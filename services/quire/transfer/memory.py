"""The pool's memory as bytes, one row per block."""

from __future__ import annotations

import ctypes
from typing import Any

from quire.transfer.layout import FRAME_BYTES


class PoolMemory:
    """Views of blocks. `buffer` is any writable, contiguous buffer of whole blocks, like the CPU
    pool's uint8 array [num_blocks, block_bytes]."""

    def __init__(self, buffer: Any, block_bytes: int) -> None:
        view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
        if view.readonly or not view.nbytes or view.nbytes % block_bytes:
            raise ValueError(f"{view.nbytes} bytes are no writable pool of {block_bytes} a block")
        self._view = view
        self.block_bytes = block_bytes
        self.num_blocks = view.nbytes // block_bytes
        self.probe = memoryview(bytearray(FRAME_BYTES))

    @property
    def pool(self) -> memoryview:
        """All of it."""
        return self._view

    def view(self, slot: int, offset: int, length: int) -> memoryview:
        """Bytes [offset, offset + length) of a block. Raises IndexError outside the pool."""
        if not (0 <= slot < self.num_blocks and 0 <= offset <= self.block_bytes - length):
            raise IndexError(f"bytes {offset}+{length} of block {slot} are outside the pool")
        start = slot * self.block_bytes + offset
        return self._view[start : start + length]

    def probe_bytes(self, length: int) -> memoryview:
        """Up to 1 MiB to measure a link with: not the pool's, which may hold someone's text."""
        return self.probe[:length]


def address_of(view: Any) -> int:
    """Where a writable buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
