"""Integer weights for the eager operations: kept small, widened whenever they are used.

Any device torch has. Products are of weights rounded to the model's dtype; a matrix is widened as a
whole on each use, so this saves memory, not time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quire.kernels.quantized import QuantizedWeight, dequantize


@dataclass(frozen=True)
class StoredQuantized:
    """A matrix [N, K] on the ops' device, with its bias [N]; fields as in `QuantizedWeight`."""

    values: torch.Tensor  # int8 [N, K], or with 4 bits two to a byte, the earlier one low
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int
    order: torch.Tensor | None
    k: int
    dtype: torch.dtype
    bias: torch.Tensor | None = None
    vocabulary: int = 0
    """Of a head: rows over all ranks."""

    @classmethod
    def of(
        cls,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StoredQuantized:
        """The matrix on `device`, to be multiplied in `dtype`."""
        values = weight.values if weight.bits == 8 else pack_nibbles(weight.values)
        return cls(
            values=values.to(device),
            scales=weight.scales.to(device),
            zeros=None if weight.zeros is None else weight.zeros.to(device),
            bits=weight.bits,
            group_size=weight.group_size,
            order=None if weight.order is None else weight.order.to(device),
            k=weight.shape[1],
            dtype=dtype,
            bias=bias,
        )

    @property
    def weight(self) -> torch.Tensor:
        """The matrix in the model's dtype, widened anew."""
        values = self.values if self.bits == 8 else unpack_nibbles(self.values, self.k)
        whole = QuantizedWeight(
            values, self.scales, self.zeros, self.bits, self.group_size, self.order
        )
        return dequantize(whole).to(self.dtype)


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] of 4-bit values as [N, ceil(K / 2)], the earlier of two in the low half."""
    pairs = F.pad(values, (0, values.shape[1] % 2))
    return (pairs[:, ::2] & 15) | (pairs[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The reverse of `pack_nibbles`: int8 [N, k], sign-extended."""
    # the low half is moved to the top for its sign to come along when it moves down again
    pairs = torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1)
    return pairs.flatten(1)[:, :k]
