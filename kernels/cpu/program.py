"""A recorded model step, replayed by one native call."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.kernels.cpu import library as lib
from quire.kernels.cpu.memory import Arena
from quire.kernels.cpu.pointers import Pointers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.kernels.cpu.exchange import Exchange
    from quire.kernels.layout import KvLayout
    from quire.kernels.ops import StepInputs

INT32 = np.dtype(np.int32)

TOKENS, LOGIT_ROWS = 0, 1
"""Domains of rows: one per token of the step, or one per row whose logits are wanted."""

ACTIVATION_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
"""What activations between matmuls are stored as, by the model's dtype."""


@dataclass(frozen=True)
class StepLimits:
    """The largest step that static buffers are made for."""

    max_tokens: int
    max_seqs: int
    max_blocks_per_seq: int
    max_logit_rows: int


class Buffer:
    """Handle to a static matrix of activations, one row per token or logit row.

    The storage goes back for reuse by operations recorded later when the last reference to the
    handle is gone: a model's variables decide which values may share memory.
    """

    def __init__(self, domain: int, dtype: str, array: np.ndarray) -> None:
        self.domain = domain
        self.dtype = dtype
        self.array = array
        """[rows, columns] view in the numpy dtype of `dtype` (bfloat16 as uint16)."""
        self._whole: Buffer | None = None

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return int(self.array.shape[1])

    def narrow(self, columns: int) -> Buffer:
        """The first columns of this buffer, whose storage stays in use."""
        part = Buffer(self.domain, self.dtype, self.array[:, :columns])
        part._whole = self
        return part

    @property
    def matrix(self) -> lib.Matrix:
        """What the library reads: address and elements between rows."""
        return lib.Matrix(self.array.ctypes.data, self.array.strides[0] // self.array.itemsize)


def _padded_stride(columns: int, itemsize: int) -> int:
    """Elements between rows: room for whole panels of 32, and an odd number of cache lines.

    Rows an even number of lines apart compete for the same few sets of the L1 cache.
    """
    lines = -(-(-(-columns // 32) * 32 * itemsize) // 64)
    return (lines | 1) * 64 // itemsize


class BufferPool:
    """Storage of activations, reused by shape."""

    def __init__(self, rows: tuple[int, int]) -> None:
        # Matmuls read rows in blocks of 32; what the rows past the end hold does not matter.
        self._rows = rows
        self._allocated_rows = tuple(-(-count // 32) * 32 for count in rows)
        self._arena = Arena()
        self._free: dict[tuple[int, int, str, bool], list[np.ndarray]] = {}

    @property
    def used(self) -> int:
        """Bytes allocated."""
        return self._arena.used

    def take(self, domain: int, columns: int, dtype: str, *, padded: bool = True) -> Buffer:
        """A buffer of this shape, reused or new; `padded` False leaves no gap between rows.

        Columns between the end of a row and its padding are zero and stay so.
        """
        key = (domain, columns, dtype, padded)
        free = self._free.setdefault(key, [])
        array = free.pop() if free else self._allocate(key)
        buffer = Buffer(domain, dtype, array)
        weakref.finalize(buffer, free.append, array).atexit = False
        return buffer

    def _allocate(self, key: tuple[int, int, str, bool]) -> np.ndarray:
        domain, columns, dtype, padded = key
        numpy_dtype = lib.NUMPY_DTYPES[dtype]
        stride = _padded_stride(columns, numpy_dtype.itemsize) if padded else columns
        storage = self._arena.take(self._allocated_rows[domain] * stride * numpy_dtype.itemsize)
        return storage.view(numpy_dtype).reshape(-1, stride)[: self._rows[domain], :columns]


@dataclass(frozen=True)
class Target:
    """What programs run on: the team, the cache and the largest step."""

    team: lib.Team
    layout: KvLayout
    pool: np.ndarray  # [num_blocks, block_bytes] uint8
    limits: StepLimits


@dataclass(frozen=True)
class Recording:
    """What `CpuOps` recorded: operations, the stops between them, and the buffer of the result."""

    ops: Sequence[lib.Op]
    exchanges: Sequence[Exchange]
    result: Buffer


class Program:
    """Operations recorded by `CpuOps`, ready to run.

    Programs recorded by one `CpuOps` share buffers: run them one at a time.
    """

    def __init__(self, target: Target, recording: Recording, keep: Sequence[object]) -> None:
        """`keep` holds whatever the operations point to. Raises ValueError for an unfit pool."""
        block_bytes = target.layout.block_bytes
        if target.pool.dtype != np.uint8 or target.pool.shape[1:] != (block_bytes,):
            raise ValueError(f"the pool must be uint8 [blocks, {block_bytes}]")
        self._library = lib.load()
        self._target = target
        ops = recording.ops
        self._result = recording.result
        self._exchanges = recording.exchanges
        self._keep = keep
        self._num_ops = len(ops)
        self._codes = [op.code for op in ops]
        self._profile: ctypes.Array[ctypes.c_double] | None = None
        layout, limits = target.layout, target.limits
        cache = lib.CacheArgs(
            target.pool.ctypes.data,
            len(target.pool),
            layout.num_layers,
            layout.num_kv_heads,
            layout.head_dim,
        )
        self._limits = lib.LimitsArgs(
            limits.max_tokens, limits.max_seqs, limits.max_blocks_per_seq, limits.max_logit_rows
        )
        self._handle = self._library.quire_program_create(
            target.team.handle, cache, lib.DTYPE_CODES[layout.dtype], self._limits
        )
        finalizer = weakref.finalize(self, _destroy, self._library, self._handle, target.team)
        finalizer.atexit = False
        for op in ops:
            if self._library.quire_program_add(self._handle, op):
                raise ValueError("all attentions of a program need one ratio of query to KV heads")

    def __len__(self) -> int:
        return self._num_ops

    @property
    def result(self) -> np.ndarray:
        """Where `run` leaves its result: the rows that the largest step has."""
        return self._result.array

    def run(self, inputs: StepInputs) -> np.ndarray:
        """Run the step; the result's rows, a view that the next run overwrites.

        For logits that is float32 [R, V]. Raises ValueError, before anything ran, for inputs
        beyond the limits or that contradict one another.
        """
        # the threads slept between steps: they wake while the arguments are put together
        self._library.quire_team_rouse(self._target.team.handle)
        rows = {TOKENS: len(inputs.token_ids), LOGIT_ROWS: len(inputs.logit_rows)}
        result = self._result.array[: rows[self._result.domain]]
        args, _arrays = _step_args(inputs)
        begin = 0
        for exchange in self._exchanges:
            self._run(args, begin, exchange.before)
            exchange.run(rows[exchange.domain])
            begin = exchange.before
        self._run(args, begin, self._num_ops)
        return result

    def run_ops(self, inputs: StepInputs, begin: int, end: int) -> None:
        """Run operations [begin, end) alone, for tests and measurements."""
        args, _arrays = _step_args(inputs)
        self._run(args, begin, end)

    def _run(self, args: lib.StepArgs, begin: int, end: int) -> None:
        problem = self._library.quire_program_run(self._handle, args, begin, end)
        if problem is not None:
            raise ValueError(f"step cannot run: {problem.decode()}")

    def copy_blocks(self, pairs: np.ndarray) -> None:
        """Copy whole blocks of the pool, int32 [n, 2] of (from, to), in order.

        Raises ValueError for blocks outside the pool.
        """
        pairs = np.ascontiguousarray(pairs, np.int32).reshape(-1, 2)
        pool = self._target.pool
        if pairs.size and (pairs.min() < 0 or pairs.max() >= len(pool)):
            raise ValueError(f"blocks must be in [0, {len(pool)})")
        self._library.quire_copy_blocks(
            self._target.team.handle,
            pool.ctypes.data,
            self._target.layout.block_bytes,
            pairs.ctypes.data,
            len(pairs),
        )

    def start_profile(self) -> None:
        """From now on measure the time of each operation."""
        self._profile = (ctypes.c_double * self._num_ops)()
        self._library.quire_program_set_profile(self._handle, self._profile)

    def progress(self) -> float:
        """Grows with each operation that ends, once `start_profile` was called. Any thread.

        A step in progress whose figure stands still is stuck in one operation.
        """
        return 0.0 if self._profile is None else sum(self._profile)

    def profile(self) -> list[tuple[str, float]]:
        """(kind, seconds) of each operation, summed over the runs since `start_profile`."""
        if self._profile is None:
            raise RuntimeError("start_profile was not called")
        names = {code: kind.__name__.removesuffix("Args") for kind, code in lib.OP_CODES.items()}
        return [
            (names[code], seconds) for code, seconds in zip(self._codes, self._profile, strict=True)
        ]


def _destroy(library: ctypes.CDLL, handle: int, team: lib.Team) -> None:
    """A program's end waits for its team's threads, so the team must still be there.

    That is what it is passed for: of a cycle, the garbage collector finalises the team first.
    """
    library.quire_program_destroy(handle)


def _step_args(inputs: StepInputs) -> tuple[lib.StepArgs, Pointers]:
    """The step as the library reads it, and what keeps the arrays that it points to.

    Raises ValueError for arrays that do not belong together.
    """
    num_tokens, num_seqs = len(inputs.token_ids), len(inputs.context_lens)
    block_tables = inputs.block_tables
    if len(inputs.positions) != num_tokens or len(inputs.query_start) != num_seqs + 1:
        raise ValueError("token_ids and positions, query_start and context_lens must match")
    if block_tables.ndim != 2 or len(block_tables) != num_seqs:
        raise ValueError("block_tables must be [sequences, blocks]")
    at = Pointers()
    args = lib.StepArgs(
        at.to(inputs.token_ids, INT32),
        at.to(inputs.positions, INT32),
        at.to(inputs.query_start, INT32),
        at.to(inputs.context_lens, INT32),
        at.to(block_tables, INT32),
        at.to(inputs.logit_rows, INT32),
        block_tables.shape[1],
        num_tokens,
        num_seqs,
        len(inputs.logit_rows),
    )
    return args, at
