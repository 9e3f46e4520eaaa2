"""CPU backend: compiled kernels, recorded programs. Importing this loads no library."""

from quire.kernels.cpu.library import (
    KV_ORDERS,
    CpuKernelsUnavailable,
    Team,
    available_isas,
    isa,
    load,
)
from quire.kernels.cpu.ops import CpuOps, MemoryUse, alloc_pool
from quire.kernels.cpu.packing import PackedLinear
from quire.kernels.cpu.program import Buffer, Program, StepLimits

__all__ = [
    "KV_ORDERS",
    "Buffer",
    "CpuKernelsUnavailable",
    "CpuOps",
    "MemoryUse",
    "PackedLinear",
    "Program",
    "StepLimits",
    "Team",
    "alloc_pool",
    "available_isas",
    "isa",
    "load",
]
