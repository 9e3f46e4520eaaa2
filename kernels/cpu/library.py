"""The compiled CPU library: loading, and the mirrors of its C structs.

Built by setup.py from `csrc/cpu`; a plain C ABI called through ctypes, which releases the GIL for
the length of a call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from quire.kernels.layout import KvOrder

LIBRARY = Path(__file__).resolve().parent.parent / "libquire_cpu.so"

ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
"""What `QUIRE_CPU_ISA` may lower the choice of instruction set to."""

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "int16": np.dtype(np.int16),  # fixed-point activations
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),  # numpy has no bfloat16: its bits
    "float16": np.dtype(np.float16),
}

KV_ORDERS = {
    "float32": KvOrder.LANES,
    "bfloat16": KvOrder.PAIRS,
    "float16": KvOrder.LANES,
}
"""The order of cache tiles that the kernels read, by dtype."""


class CpuKernelsUnavailable(RuntimeError):
    """The compiled library is missing or does not fit; the torch path is what remains."""


class Matrix(ctypes.Structure):
    """Matrix of csrc/cpu/kernels.h."""

    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class EmbedArgs(ctypes.Structure):
    """EmbedArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("table", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("out", Matrix),
        ("first", c_int64),
        ("vocabulary", c_int64),
    ]


class RmsNormArgs(ctypes.Structure):
    """RmsNormArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("input", Matrix),
        ("out", Matrix),
        ("weight", c_void_p),
        ("columns", c_int64),
        ("eps", c_float),
    ]


class LinearArgs(ctypes.Structure):
    """LinearArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("input", Matrix),
        ("out", Matrix),
        ("k", c_int64),
        ("n", c_int64),
        ("epilogue", c_int32),
    ]


class FixedPointArgs(ctypes.Structure):
    """FixedPointArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("input", Matrix),
        ("out", Matrix),
        ("order", c_void_p),
        ("k", c_int64),
        ("block", c_int64),
    ]


class NormFixedPointArgs(ctypes.Structure):
    """NormFixedPointArgs of csrc/cpu/kernels.h."""

    _fields_ = [("norm", RmsNormArgs), ("fixed_point", FixedPointArgs)]


class QuantizedLinearArgs(ctypes.Structure):
    """QuantizedLinearArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("linear", LinearArgs),
        ("group_size", c_int64),
        ("block", c_int64),
        ("bits", c_int32),
        ("has_zeros", c_int32),
    ]


class HeadShape(ctypes.Structure):
    """HeadShape of csrc/cpu/kernels.h."""

    _fields_ = [
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("layer", c_int64),
    ]


class RopeArgs(ctypes.Structure):
    """RopeArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("qkv", Matrix),
        ("shape", HeadShape),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("max_positions", c_int64),
        ("rotary_dim", c_int64),
        ("eps", c_float),
    ]


class AttentionArgs(ctypes.Structure):
    """AttentionArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("qkv", Matrix),
        ("out", Matrix),
        ("shape", HeadShape),
        ("window", c_int64),
        ("scale", c_float),
    ]


class TakeRowsArgs(ctypes.Structure):
    """TakeRowsArgs of csrc/cpu/kernels.h."""

    _fields_ = [("input", Matrix), ("out", Matrix), ("row_bytes", c_int64)]


class PartsArgs(ctypes.Structure):
    """PartsArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("parts", c_void_p),
        ("num_parts", c_int64),
        ("columns", c_int64),
        ("out", Matrix),
        ("accumulate", c_int32),
    ]


class SumPartsArgs(PartsArgs):
    """Sums the parts of all ranks."""


class JoinColumnsArgs(PartsArgs):
    """Puts the columns of all ranks beside one another."""


OpArgs = (
    EmbedArgs
    | RmsNormArgs
    | LinearArgs
    | RopeArgs
    | AttentionArgs
    | TakeRowsArgs
    | SumPartsArgs
    | JoinColumnsArgs
    | FixedPointArgs
    | QuantizedLinearArgs
    | NormFixedPointArgs
)

OP_CODES: dict[type[OpArgs], int] = {
    EmbedArgs: 0,
    RmsNormArgs: 1,
    LinearArgs: 2,
    RopeArgs: 3,
    AttentionArgs: 4,
    TakeRowsArgs: 5,
    SumPartsArgs: 6,
    JoinColumnsArgs: 7,
    FixedPointArgs: 8,
    QuantizedLinearArgs: 9,
    NormFixedPointArgs: 10,
}


class _OpUnion(ctypes.Union):
    _fields_ = [(f"args{code}", kind) for kind, code in OP_CODES.items()]


class Op(ctypes.Structure):
    """Op of csrc/cpu/kernels.h."""

    _fields_ = [("code", c_int32), ("domain", c_int32), ("args", _OpUnion)]

    @classmethod
    def of(cls, args: OpArgs, domain: int) -> Op:
        """Make the operation that `args` belongs to, over rows of `domain`."""
        op = cls(OP_CODES[type(args)], domain)
        setattr(op.args, f"args{op.code}", args)
        return op


class CacheArgs(ctypes.Structure):
    """Cache of csrc/cpu/kernels.h."""

    _fields_ = [
        ("pool", c_void_p),
        ("num_blocks", c_int64),
        ("num_layers", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
    ]


class LimitsArgs(ctypes.Structure):
    """Limits of csrc/cpu/program.h."""

    _fields_ = [
        ("max_tokens", c_int64),
        ("max_seqs", c_int64),
        ("max_blocks_per_seq", c_int64),
        ("max_logit_rows", c_int64),
    ]


class StepArgs(ctypes.Structure):
    """StepArgs of csrc/cpu/kernels.h."""

    _fields_ = [
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("logit_rows", c_void_p),
        ("block_table_stride", c_int64),
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("num_logit_rows", c_int64),
    ]


class PackSource(ctypes.Structure):
    """Source of csrc/cpu/pack.cpp."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("rows", c_int64),
        ("k", c_int64),
        ("row_stride", c_int64),
    ]


class PackDestination(ctypes.Structure):
    """Destination of csrc/cpu/pack.cpp."""

    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("first", c_int64), ("step", c_int64)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "quire_isa": (ctypes.c_char_p, []),
    "quire_team_create": (c_void_p, [c_int32, c_int32]),
    "quire_team_destroy": (None, [c_void_p]),
    "quire_team_rouse": (None, [c_void_p]),
    "quire_alloc": (c_void_p, [c_int64]),
    "quire_free": (None, [c_void_p, c_int64]),
    "quire_copy_blocks": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_int64]),
    "quire_packed_elements": (c_int64, [c_int32, c_int64, c_int64]),
    "quire_pack": (
        None,
        [c_void_p, ctypes.POINTER(PackSource), ctypes.POINTER(PackDestination)],
    ),
    "quire_program_create": (
        c_void_p,
        [c_void_p, ctypes.POINTER(CacheArgs), c_int32, ctypes.POINTER(LimitsArgs)],
    ),
    "quire_program_destroy": (None, [c_void_p]),
    "quire_op_bytes": (c_int64, []),
    "quire_program_add": (c_int32, [c_void_p, ctypes.POINTER(Op)]),
    "quire_program_set_profile": (None, [c_void_p, ctypes.POINTER(c_double)]),
    "quire_program_run": (
        ctypes.c_char_p,
        [c_void_p, ctypes.POINTER(StepArgs), c_int64, c_int64],
    ),
}


@functools.cache
def load() -> ctypes.CDLL:
    """The library, loaded once per process.

    Raises CpuKernelsUnavailable where it was not built or belongs to another version, ValueError
    for an unknown QUIRE_CPU_ISA.
    """
    isa = os.environ.get("QUIRE_CPU_ISA")
    if isa is not None and isa not in ISAS:
        raise ValueError(f"QUIRE_CPU_ISA must be one of {', '.join(ISAS)}, not {isa!r}")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise CpuKernelsUnavailable(
            f"the CPU kernels are not usable ({error}); install a C++17 compiler and install "
            "quire again to build them"
        ) from error
    if library.quire_op_bytes() != ctypes.sizeof(Op):
        raise CpuKernelsUnavailable(f"{LIBRARY} was built from another version; install again")
    return library


def isa() -> str:
    """Name of the instruction set in use: generic, avx2, avx512, avx512_bf16 or amx."""
    name: bytes = load().quire_isa()
    return name.decode()


def available_isas() -> tuple[str, ...]:
    """Values of QUIRE_CPU_ISA up to the one in use."""
    return ISAS[: ISAS.index(isa()) + 1]


class Team:
    """A thread team of the library: the calling thread and `num_threads` - 1 more.

    With `pin` each thread stays on one CPU of those the process may use, the calling thread from
    its first job on. Jobs of one team take turns; an idle team sleeps.
    """

    def __init__(self, num_threads: int | None = None, *, pin: bool = False) -> None:
        """Start the threads; by default one per CPU that the process may use."""
        library = load()
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self.handle: int = library.quire_team_create(self.num_threads, pin)
        weakref.finalize(self, library.quire_team_destroy, self.handle)
