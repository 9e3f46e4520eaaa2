"""Weights in the form that the compiled kernels stream: panels of 32 output columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.kernels.cpu import library as lib
from quire.kernels.cpu.memory import Arena
from quire.kernels.cpu.quantized import PackedQuantized, layout_of, order_of, packed_bytes
from quire.kernels.group import part_of
from quire.kernels.quantized import split_kinds, stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.kernels.group import Group
    from quire.kernels.quantized import Matrix, QuantizedWeight


@dataclass(frozen=True)
class PackedLinear:
    """A weight matrix [n, k] in panels, see csrc/cpu/gemm.h."""

    data: np.ndarray  # uint8
    bias: np.ndarray | None  # float32, [n] and zeros up to a multiple of 32
    n: int  # columns of the result; gate and up together for `gate_up_silu`
    k: int
    is_gate_up: bool = False


@dataclass(frozen=True)
class PackedTable(PackedLinear):
    """Rows [first, first + n) of an embedding of `vocabulary` rows; rows past the end are zero."""

    first: int = 0
    vocabulary: int = 0


def _dtype_name(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in lib.DTYPE_CODES:
        raise TypeError(f"weights must be one of {sorted(lib.DTYPE_CODES)}, not {name}")
    return name


def floats(tensor: torch.Tensor, size: int) -> np.ndarray:
    """A vector [size] as float32. Raises ValueError for another shape."""
    if tensor.shape != (size,):
        raise ValueError(f"expected a vector [{size}], not {tuple(tensor.shape)}")
    vector: np.ndarray = tensor.detach().float().contiguous().numpy()
    return vector


class Packer:
    """Packs weights into memory of its own, in `dtype`."""

    def __init__(self, dtype: str, team: lib.Team, group: Group) -> None:
        self._library = lib.load()
        self._dtype, self._team, self._group = dtype, team, group
        self._weights = Arena()

    def pack_linear(
        self, weights: Sequence[Matrix], bias: Sequence[torch.Tensor | None] = ()
    ) -> PackedLinear | PackedQuantized:
        """Stack [N_i, K] matrices along N and pack them, with a bias each or none.

        Sources are read once, in order, straight from where they lie (a mapped file). Raises
        ValueError for shapes or kinds that do not fit, TypeError for other dtypes than the three.
        """
        floats, integers = split_kinds(weights)
        stacked_bias = self._stack_bias(weights, bias)
        if integers:
            whole = stack(integers)
            quantized = self._allocate_quantized(whole, stacked_bias, len(whole))
            quantized.fill(self._team, whole, 0, 16)
            return quantized
        n, k = sum(len(weight) for weight in floats), int(floats[0].shape[1])
        packed = PackedLinear(self._allocate(n, k), stacked_bias, n, k)
        first = 0
        for weight in floats:
            self._pack(weight, packed, first, 16)
            first += len(weight)
        return packed

    def pack_gate_up(self, gate: Matrix, up: Matrix) -> PackedLinear | PackedQuantized:
        """Interleave two [I, K] matrices by 16 rows, so that a panel holds both of 16 outputs."""
        if gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must agree")
        floats, integers = split_kinds((gate, up))
        if integers:
            whole, half = stack(integers), len(gate)
            quantized = self._allocate_quantized(whole, None, 2 * half, is_gate_up=True)
            quantized.fill(self._team, whole.rows(range(half)), 0, 32)
            quantized.fill(self._team, whole.rows(range(half, 2 * half)), 16, 32)
            return quantized
        n, k = 2 * len(gate), int(gate.shape[1])
        packed = PackedLinear(self._allocate(n, k), None, n, k, is_gate_up=True)
        for first, weight in zip((0, 16), floats, strict=True):
            self._pack(weight, packed, first, 32)
        return packed

    def pack_embedding(self, table: torch.Tensor, vocabulary: int | None = None) -> PackedTable:
        """Pack a [V, H] table, or this rank's rows of one of `vocabulary` rows in all.

        The same object serves `embed` and, tied, `logits`.
        """
        total = len(table) if vocabulary is None else vocabulary
        group = self._group
        own = part_of(total, group.rank, group.size)
        if len(table) != len(own):
            raise ValueError(f"{len(table)} rows are not the {len(own)} of rank {group.rank}")
        # every rank's logits are as wide as the first one's
        n, k = len(part_of(total, 0, group.size)), int(table.shape[1])
        packed = PackedTable(self._allocate(n, k), None, n, k, first=own.start, vocabulary=total)
        self._pack(table, packed, 0, 16)
        return packed

    def pack_head(
        self, matrix: Matrix, vocabulary: int | None = None
    ) -> PackedTable | PackedQuantized:
        """Pack a [V, H] matrix for `logits`, or this rank's rows of one of `vocabulary` in all."""
        if isinstance(matrix, torch.Tensor):
            return self.pack_embedding(matrix, vocabulary)
        total = len(matrix) if vocabulary is None else vocabulary
        n = len(part_of(total, 0, self._group.size))
        packed = replace(self._allocate_quantized(matrix, None, n), vocabulary=total)
        packed.fill(self._team, matrix, 0, 16)
        return packed

    def _allocate(self, n: int, k: int) -> np.ndarray:
        elements = self._library.quire_packed_elements(lib.DTYPE_CODES[self._dtype], n, k)
        return self._weights.take(elements * lib.NUMPY_DTYPES[self._dtype].itemsize)

    def _allocate_quantized(
        self, weight: QuantizedWeight, bias: np.ndarray | None, n: int, *, is_gate_up: bool = False
    ) -> PackedQuantized:
        layout = layout_of(weight)
        data = self._weights.take(packed_bytes(layout, n))
        return PackedQuantized(data, bias, order_of(weight), n, layout, is_gate_up)

    def _pack(self, weight: torch.Tensor, packed: PackedLinear, first: int, step: int) -> None:
        if weight.ndim != 2 or weight.shape[1] != packed.k:
            raise ValueError(f"expected a matrix [N, {packed.k}], not {tuple(weight.shape)}")
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        source = lib.PackSource(
            weight.data_ptr(),
            lib.DTYPE_CODES[_dtype_name(weight)],
            len(weight),
            packed.k,
            weight.stride(0),
        )
        destination = lib.PackDestination(
            packed.data.ctypes.data, lib.DTYPE_CODES[self._dtype], first, step
        )
        self._library.quire_pack(self._team.handle, source, destination)

    def _stack_bias(
        self, weights: Sequence[Matrix], bias: Sequence[torch.Tensor | None]
    ) -> np.ndarray | None:
        if all(part is None for part in bias):
            return None
        n = sum(len(weight) for weight in weights)
        stacked = self._weights.take(32 * -(-n // 32) * 4).view(np.float32)
        first = 0
        for weight, part in zip(weights, bias, strict=True):
            if part is not None:
                stacked[first : first + len(weight)] = floats(part, len(weight))
            first += len(weight)
        return stacked
