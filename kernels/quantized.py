"""Matrices of small integers with scales: what a quantized checkpoint holds, whatever its format.

A matrix [N, K] is cut along K into groups; in row n and group g

    weight = (value - zero[n, g]) * scale[n, g]

`value` is a signed integer of 4 or 8 bits; zero points that are zero everywhere are left out.
Formats that count from 0 are moved by half their range on the way in, values and zero points alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP_MULTIPLE = 16
"""Groups are cut at multiples of this many k: what kernels take at a time."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix [N, K], or the part of it that a rank holds.

    Raises ValueError for parts that do not belong together.
    """

    values: torch.Tensor  # int8 [N, K]
    scales: torch.Tensor  # float32 [N, groups]
    zeros: torch.Tensor | None  # int16 [N, groups]
    bits: int
    group_size: int
    """Columns of a group; K where one scale serves a whole row."""
    order: torch.Tensor | None = None  # int64 [K]: column k of `values` is for input order[k]

    def __post_init__(self) -> None:
        n, k = self.values.shape
        if self.group_size % GROUP_MULTIPLE and self.group_size < k:
            raise ValueError(
                f"groups of {self.group_size} columns are not supported: a multiple of "
                f"{GROUP_MULTIPLE} is needed"
            )
        for name, tensor in (("scales", self.scales), ("zero points", self.zeros)):
            if tensor is not None and tensor.shape != (n, self.num_groups):
                raise ValueError(
                    f"{name} {list(tensor.shape)} do not fit a matrix [{n}, {k}] with groups of "
                    f"{self.group_size}"
                )

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.values.shape

    @property
    def num_groups(self) -> int:
        """Groups of a row, the last one maybe shorter."""
        return -(-self.values.shape[1] // self.group_size)

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, rows: range) -> QuantizedWeight:
        """Some rows."""
        part = slice(rows.start, rows.stop)
        zeros = None if self.zeros is None else self.zeros[part]
        return replace(self, values=self.values[part], scales=self.scales[part], zeros=zeros)

    def padded(self, rows: int) -> QuantizedWeight:
        """The matrix with so many rows of zeros at its end."""

        def pad(part: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(part, (0, 0, 0, rows))

        zeros = None if self.zeros is None else pad(self.zeros)
        return replace(self, values=pad(self.values), scales=pad(self.scales), zeros=zeros)


Matrix = torch.Tensor | QuantizedWeight
"""A weight [N, K] as it comes from a checkpoint."""


def split_kinds(
    weights: Sequence[Matrix],
) -> tuple[list[torch.Tensor], list[QuantizedWeight]]:
    """Float and integer matrices that will be one. Raises ValueError where both are among them."""
    floats = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    integers = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if floats and integers:
        raise ValueError("matrices that are fused (q, k and v; gate and up) must all be quantized")
    return floats, integers


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """The float32 matrix [N, K] that the integers stand for, columns in the order of the input."""
    k = weight.values.shape[1]
    group = torch.arange(k, device=weight.values.device) // weight.group_size
    values = weight.values.float()
    if weight.zeros is not None:
        values -= weight.zeros.float()[:, group]
    values *= weight.scales[:, group]
    if weight.order is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.order, values)


def quantize(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Round a float matrix [N, K] to nearest, symmetric, with a scale for every group of columns.

    The scale is the one of `CANDIDATES` times the largest of a group that leaves the least squared
    error: with few bits it pays to clip the largest a little. A last group may be shorter.
    """
    n, k = weight.shape
    padded = -(-k // group_size) * group_size
    # [N, groups, group_size]
    groups = torch.nn.functional.pad(weight.float(), (0, padded - k)).view(n, -1, group_size)
    top = 2 ** (bits - 1) - 1
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    best_error = torch.full_like(largest, torch.inf)
    scales = torch.empty_like(largest)
    for share in CANDIDATES[bits]:
        candidate = largest * (share / top)
        rounded = (groups / candidate).round_().clamp_(-top - 1, top)
        error = rounded.mul_(candidate).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best_error
        scales = torch.where(better, candidate, scales)
        best_error = torch.where(better, error, best_error)
    values = (groups / scales).round_().clamp_(-top - 1, top).to(torch.int8)
    return QuantizedWeight(
        values=values.view(n, padded)[:, :k],
        scales=scales.view(n, -1),
        zeros=None,
        bits=bits,
        group_size=group_size,
    )


CANDIDATES = {8: (1.0,), 4: (1.0, 0.92, 0.84, 0.76)}
"""Shares of a group's largest magnitude that its scale may be made for, by bits."""


def stack(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Matrices of one input along N. Raises ValueError where they are quantized differently."""
    first = weights[0]
    for other in weights[1:]:
        if (other.bits, other.group_size, other.shape[1]) != (
            first.bits,
            first.group_size,
            first.shape[1],
        ):
            raise ValueError("matrices that share an input must share bits and group size")
        if not _same_order(first.order, other.order):
            raise ValueError("matrices that share an input must permute it alike (desc_act)")
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zeros = torch.cat([_zeros_of(weight) for weight in weights])
    return replace(
        first,
        values=torch.cat([weight.values for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zeros=zeros,
    )


def _zeros_of(weight: QuantizedWeight) -> torch.Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.zeros(weight.scales.shape, dtype=torch.int16)


def _same_order(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
