"""How many KV blocks an engine gets."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire.engine.request import BLOCK_SIZE

if TYPE_CHECKING:
    import numpy as np

GIB = 1 << 30


class KvCacheTooSmall(ValueError):
    """One request of max_model_len tokens would not fit."""


@dataclass(frozen=True)
class KvBudget:
    """Bytes the KV cache may take, and why."""

    bytes: int
    source: str
    """How the figure came about, for the error message."""


def num_blocks(budget: KvBudget, block_bytes: int, max_model_len: int) -> int:
    """Blocks that fit the budget.

    Raises KvCacheTooSmall, saying what would fit, when a single request of max_model_len does not.
    """
    blocks = budget.bytes // block_bytes
    needed = -(-max_model_len // BLOCK_SIZE)
    if blocks >= needed:
        return blocks
    shorter = f"use --max-model-len {blocks * BLOCK_SIZE} or less, or " if blocks > 0 else ""
    raise KvCacheTooSmall(
        f"the KV cache of one request with max_model_len={max_model_len} needs "
        f"{needed * block_bytes / GIB:.2f} GiB, but {budget.bytes / GIB:.2f} GiB are available "
        f"({budget.source}): {shorter}give --kv-cache-memory-bytes {needed * block_bytes} or more"
    )


def give_back(array: np.ndarray) -> int:
    """Let the system have the pages of an array that nobody uses; they come back zeroed when they
    are touched. Returns by how many bytes the process got smaller. Raises OSError."""
    page = mmap.PAGESIZE
    start = -(-array.ctypes.data // page) * page
    end = (array.ctypes.data + array.nbytes) // page * page
    before = _resident_bytes()
    if end > start:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")
    return max(before - _resident_bytes(), 0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


def available_host_bytes() -> int:
    """Host memory that may still be used: free or reclaimable, within the cgroup's limit."""
    free = _meminfo("MemAvailable")
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None:
            free = min(free, max(limit - usage, 0))
    return free


_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
