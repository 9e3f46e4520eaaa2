"""A pool in host memory that passes for a device's: its blocks are exchanged by copies through
places of their own, as those of a CUDA pool are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quire.engine.runner.pool_copies import PoolCopies
from quire.transfer.staging import StagedMemory

if TYPE_CHECKING:
    from quire.engine.runner.backend import Backend


def kv_memory(backend: Backend, staging_bytes: int) -> StagedMemory:
    """In the place of a backend's method."""
    return StagedMemory(PoolCopies(torch.from_numpy(backend.host_pool()), staging_bytes))
