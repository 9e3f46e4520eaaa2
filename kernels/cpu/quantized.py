"""Integer weights for the compiled kernels: packed panels, and the activations they multiply.

Weights keep their 4 or 8 bits; activations are rounded to block fixed point of 16 bits (exact for
bfloat16 down to 1/128 of a block's largest), and products are summed as integers. See
csrc/cpu/fixed_point.h and gemm_quantized.h.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.kernels.cpu import library as lib

if TYPE_CHECKING:
    from quire.kernels.quantized import QuantizedWeight

MAX_BLOCK = 128
"""Activations that share a scale, at most: kMaxFixedBlock of csrc/cpu/kernels.h."""


class Layout(ctypes.Structure):
    """QuantizedLayout of csrc/cpu/quantized_layout.h."""

    _fields_ = [
        ("k", c_int64),
        ("group_size", c_int64),
        ("bits", c_int32),
        ("has_zeros", c_int32),
    ]


class _Source(ctypes.Structure):
    """QuantizedSource of csrc/cpu/pack_quantized.cpp."""

    _fields_ = [("values", c_void_p), ("scales", c_void_p), ("zeros", c_void_p), ("rows", c_int64)]


class _Destination(ctypes.Structure):
    """QuantizedDestination of csrc/cpu/pack_quantized.cpp."""

    _fields_ = [("data", c_void_p), ("layout", Layout), ("first", c_int64), ("step", c_int64)]


@dataclass(frozen=True)
class PackedQuantized:
    """An integer matrix [n, k] in panels, see csrc/cpu/quantized_layout.h."""

    data: np.ndarray  # uint8
    bias: np.ndarray | None  # float32, [n] and zeros up to a multiple of 32
    order: np.ndarray | None  # int32 [k]: where in the input each column's factor is
    n: int
    layout: Layout
    is_gate_up: bool = False
    vocabulary: int = 0
    """Of a head: rows over all ranks."""

    @property
    def k(self) -> int:
        """Columns of the input."""
        return int(self.layout.k)

    @property
    def block(self) -> int:
        """Activations that share a scale."""
        group = int(self.layout.group_size)
        return MAX_BLOCK if group >= self.k else math.gcd(group, MAX_BLOCK)

    @property
    def fixed_columns(self) -> int:
        """int16 of a row of fixed-point activations: values, then float32 scales."""
        return -(-self.k // 32) * 32 + 2 * -(-self.k // self.block)

    def fill(self, team: lib.Team, weight: QuantizedWeight, first: int, step: int) -> None:
        """Put row r of `weight` into column first + r // 16 * step + r % 16."""
        function = lib.load().quire_pack_quantized
        function.restype = None
        function.argtypes = [c_void_p, ctypes.POINTER(_Source), ctypes.POINTER(_Destination)]
        values, scales = weight.values.contiguous(), weight.scales.contiguous()
        zeros = None if weight.zeros is None else weight.zeros.contiguous()
        source = _Source(
            values.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            len(values),
        )
        destination = _Destination(self.data.ctypes.data, self.layout, first, step)
        function(team.handle, source, destination)

    def args(self, linear: lib.LinearArgs) -> lib.QuantizedLinearArgs:
        """What the library reads; `linear` with fixed-point activations for its input."""
        layout = self.layout
        return lib.QuantizedLinearArgs(
            linear, layout.group_size, self.block, layout.bits, layout.has_zeros
        )


def layout_of(weight: QuantizedWeight) -> Layout:
    """How the weight will lie in memory."""
    return Layout(weight.shape[1], weight.group_size, weight.bits, weight.zeros is not None)


def packed_bytes(layout: Layout, n: int) -> int:
    """Bytes of a packed matrix of n columns."""
    function = lib.load().quire_quantized_bytes
    function.restype, function.argtypes = c_int64, [ctypes.POINTER(Layout), c_int64]
    return int(function(layout, n))


def order_of(weight: QuantizedWeight) -> np.ndarray | None:
    """The permutation of the input as the library reads it."""
    if weight.order is None:
        return None
    order: np.ndarray = weight.order.numpy().astype(np.int32)
    return order


def norm_into(op: lib.Op, matrix: lib.Matrix) -> lib.RmsNormArgs | None:
    """The arguments of an operation that is a norm with `matrix` for its result."""
    code = lib.OP_CODES[lib.RmsNormArgs]
    if op.code != code:
        return None
    args: lib.RmsNormArgs = getattr(op.args, f"args{code}")
    return args if args.out.data == matrix.data else None
