"""Sampling on the CPU by the compiled library: `quire.kernels.torch_sampler`, many times faster.

Same rules, same noise; scores differ from the torch ones in the last bits, so only near ties are
drawn differently. A token does not depend on its batch or on the number of threads. On the order of
tokens and on NaN see `torch_sampler`; on how it is done, `csrc/cpu/sample.cpp`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quire.kernels.cpu.library import load
from quire.kernels.cpu.pointers import Pointers, address
from quire.kernels.sampling import DRAW_RULE

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.kernels.cpu.library import Team
    from quire.kernels.sampling import LogitEdits, SamplingBatch


FLOAT32, INT32, UINT32 = map(np.dtype, (np.float32, np.int32, np.uint32))


class _EditArgs(ctypes.Structure):
    """EditArgs of csrc/cpu/sample.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "repetition",
            "frequency",
            "presence",
            "history",
            "history_start",
            "num_prompt",
            "bias_ids",
            "bias_values",
            "bias_start",
            "allowed",
            "allowed_row",
        )
    ]


class _SampleArgs(ctypes.Structure):
    """SampleArgs of csrc/cpu/sample.h."""

    arrays: Pointers
    """What it points to lives as long as it does."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("num_draws", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("rules", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("edits", ctypes.POINTER(_EditArgs)),
        ("tokens", ctypes.c_void_p),
        ("invalid", ctypes.c_void_p),
    ]


class _LogprobArgs(ctypes.Structure):
    """LogprobArgs of csrc/cpu/sample.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("num_draws", ctypes.c_int64),
        ("num_top", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top", ctypes.c_void_p),
    ]


def _edit_args(edits: LogitEdits, at: Pointers) -> _EditArgs:
    return _EditArgs(
        repetition=at.to(edits.repetition, FLOAT32),
        frequency=at.to(edits.frequency, FLOAT32),
        presence=at.to(edits.presence, FLOAT32),
        history=at.to(edits.history, INT32),
        history_start=at.to(edits.history_start, INT32),
        num_prompt=at.to(edits.num_prompt, INT32),
        bias_ids=at.to(edits.bias_ids, INT32),
        bias_values=at.to(edits.bias_values, FLOAT32),
        bias_start=at.to(edits.bias_start, INT32),
        allowed=at.to(edits.allowed, UINT32),
        allowed_row=at.to(edits.allowed_row, INT32),
    )


class Logprobs(NamedTuple):
    """Log-probabilities of N draws under the unedited logits, and the k likeliest tokens."""

    chosen: np.ndarray  # [N] float32
    ranks: np.ndarray  # [N] int32, 1 for the likeliest token
    top_ids: np.ndarray  # [N, k] int32
    top: np.ndarray  # [N, k] float32


def _row_stride(logits: np.ndarray) -> int:
    """Elements between rows. Raises ValueError for logits the library cannot read."""
    if logits.dtype != FLOAT32 or logits.ndim != 2:
        raise ValueError(f"logits must be float32 [R, V], not {logits.dtype} {logits.shape}")
    if logits.shape[1] > 1 and logits.strides[1] != 4:
        raise ValueError("the logits of a row must be contiguous")
    return logits.strides[0] // 4


class CpuSampler:
    """Draws tokens with the threads of a team, whose jobs take turns.

    Raises CpuKernelsUnavailable where the library was not built.
    """

    def __init__(self, team: Team) -> None:
        library = load()
        self._team = team
        self._logits = np.empty((0, 0), np.float32)
        self._place = (0, 0)
        self._sample = library.quire_sample
        self._logprobs = library.quire_logprobs
        for function, args in ((self._sample, _SampleArgs), (self._logprobs, _LogprobArgs)):
            function.argtypes = [ctypes.c_void_p, ctypes.POINTER(args)]
            function.restype = ctypes.c_int32

    def sample(
        self, logits: np.ndarray, batch: SamplingBatch, invalid: np.ndarray | None = None
    ) -> np.ndarray:
        """Draw one token for each of the N draws from float32 logits [R, V]: int32 [N].

        `invalid` bool [N], when given, is set where a draw had no candidate (its token is 0).
        Raises IndexError for a row out of range, ValueError for logits of another type.
        """
        return self.prepare(logits, batch, invalid)(len(logits))

    def prepare(
        self, logits: np.ndarray, batch: SamplingBatch, invalid: np.ndarray | None = None
    ) -> Callable[[int], np.ndarray]:
        """Get ready to `sample` from logits that are yet to be computed, while the caches hold what
        that takes. What is returned does it, given how many of the rows were."""
        num_draws = len(batch.rows)
        tokens = np.empty(num_draws, np.int32)
        flags = np.empty(num_draws, np.bool_) if invalid is None else invalid
        at = Pointers()
        first, row_stride = self._place_of(logits)
        args = _SampleArgs(
            logits=first,
            row_stride=row_stride,
            vocabulary=logits.shape[1],
            num_draws=num_draws,
            rows=at.to(batch.rows, INT32),
            rules=at.to(batch.rules, DRAW_RULE),
            position=at.to(batch.position, UINT32),
            edits=None if batch.edits is None else ctypes.pointer(_edit_args(batch.edits, at)),
            tokens=at.of(tokens),
            invalid=at.of(flags),
        )
        at.keep(logits)
        args.arrays = at

        def draw(num_rows: int) -> np.ndarray:
            args.num_rows = num_rows
            if self._sample(self._team.handle, args):
                raise IndexError(f"a row is outside of 0 .. {num_rows - 1}")
            return tokens

        return draw

    def _place_of(self, logits: np.ndarray) -> tuple[int, int]:
        """Address and row stride of logits, which are the same array in every step."""
        if logits is not self._logits:
            self._place = (address(logits), _row_stride(logits))
            self._logits = logits
        return self._place

    def logprobs(
        self, logits: np.ndarray, rows: np.ndarray, token_ids: np.ndarray, num_top: int
    ) -> Logprobs:
        """Log-softmax in float32 of the raw rows [N] of logits [R, V] at token_ids [N].

        Raises IndexError for a row or token out of range, ValueError for logits of another type.
        """
        num_draws, num_top = len(rows), min(num_top, logits.shape[1])
        out = Logprobs(
            np.empty(num_draws, np.float32),
            np.empty(num_draws, np.int32),
            np.empty((num_draws, num_top), np.int32),
            np.empty((num_draws, num_top), np.float32),
        )
        at = Pointers()
        args = _LogprobArgs(
            logits=at.of(logits),
            num_rows=logits.shape[0],
            row_stride=_row_stride(logits),
            vocabulary=logits.shape[1],
            num_draws=num_draws,
            num_top=num_top,
            rows=at.to(rows, INT32),
            token_ids=at.to(token_ids, INT32),
            chosen=at.of(out.chosen),
            ranks=at.of(out.ranks),
            top_ids=at.of(out.top_ids),
            top=at.of(out.top),
        )
        if self._logprobs(self._team.handle, args):
            raise IndexError(f"a row or a token is outside of logits {logits.shape}")
        return out
