"""How long work takes on a device, kernel by kernel."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

FLUSH_BYTES = 256 << 20
"""Written between two measurements: more than any GPU's last-level cache."""


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time of `work` with cold caches, after a first call that does not count.

    On a GPU between two events on the device; the host runs ahead while the cache is overwritten,
    so that launches are not measured.
    """
    work()
    if device.type != "cuda":
        return median(_host_seconds(work) for _ in range(repeats))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return median(float(begin.elapsed_time(end)) / 1e3 for begin, end in pairs)


def _host_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
