"""Weights in the form that the compiled kernels stream: panels of 32 output columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.kernels.cpu import library as lib
from quire.kernels.group import part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quire.kernels.group import Group


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
        self._weights = lib.Arena()

    def pack_linear(
        self, weights: Sequence[torch.Tensor], bias: Sequence[torch.Tensor | None] = ()
    ) -> PackedLinear:
        """Stack [N_i, K] matrices along N and pack them, with a bias each or none.

        Sources are read once, in order, straight from where they lie (a mapped file). Raises
        ValueError for shapes that do not fit, TypeError for other dtypes than the three.
        """
        n, k = sum(len(weight) for weight in weights), int(weights[0].shape[1])
        packed = PackedLinear(self._allocate(n, k), self._stack_bias(weights, bias), n, k)
        first = 0
        for weight in weights:
            self._pack(weight, packed, first, 16)
            first += len(weight)
        return packed

    def pack_gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> PackedLinear:
        """Interleave two [I, K] matrices by 16 rows, so that a panel holds both of 16 outputs."""
        if gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must agree")
        n, k = 2 * len(gate), int(gate.shape[1])
        packed = PackedLinear(self._allocate(n, k), None, n, k, is_gate_up=True)
        self._pack(gate, packed, 0, 32)
        self._pack(up, packed, 16, 32)
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

    def _allocate(self, n: int, k: int) -> np.ndarray:
        elements = self._library.quire_packed_elements(lib.DTYPE_CODES[self._dtype], n, k)
        return self._weights.take(elements * lib.NUMPY_DTYPES[self._dtype].itemsize)

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
        self, weights: Sequence[torch.Tensor], bias: Sequence[torch.Tensor | None]
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
