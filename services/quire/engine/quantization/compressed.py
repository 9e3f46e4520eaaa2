"""Checkpoints of compressed-tensors (llm-compressor): integer weights, packed or plain.

    pack-quantized                                    int-quantized, naive-quantized
    weight_packed      int32 [N, K / per word]        weight             int8 [N, K]
    weight_scale       [N, groups]                    weight_scale       [N, groups]
    weight_zero_point  int32 [N / per word, groups]   weight_zero_point  int8 [N, groups]
    weight_shape       N, K

Packed values count from 0, the others from the middle. Zero points are there when a scheme is not
symmetric. `weight_g_idx` [K] is the group of each k with actorder "group". Schemes that would round
activations to 8 bits as well are read as weights alone: activations keep more bits here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quire.engine.quantization.format import column_order
from quire.engine.quantization.words import centred, unpack, word_range, zero_points
from quire.kernels.quantized import QuantizedWeight

if TYPE_CHECKING:
    from quire.engine.models.weights import Weights
    from quire.engine.quantization.format import Part


@dataclass(frozen=True)
class CompressedTensors:
    """One layer's settings."""

    bits: int
    group_size: int | None
    permutes: bool
    """actorder "group"."""
    has_zeros: bool
    is_packed: bool

    def read(self, weights: Weights, name: str, part: Part) -> QuantizedWeight:
        """The matrix of the layer `name`."""
        for unused in ("input_scale", "input_zero_point"):
            weights.ignore(f"{name}.{unused}")
        values = self._values(weights, name, part)
        group_size = self.group_size or values.shape[1]
        order = None
        if self.permutes:
            order = column_order(weights.take(f"{name}.weight_g_idx"), group_size)
            values = values if order is None else values[:, order]
        groups = part.groups(self.group_size)
        scales = weights.take(f"{name}.weight_scale", part.rows, groups)
        return QuantizedWeight(
            values=values,
            scales=scales.float(),
            zeros=self._zeros(weights, name, part) if self.has_zeros else None,
            bits=self.bits,
            group_size=group_size,
            order=order,
        )

    def _values(self, weights: Weights, name: str, part: Part) -> torch.Tensor:
        """int8 [rows, columns]."""
        if not self.is_packed:
            return weights.take(f"{name}.weight", part.rows, part.columns)
        columns = part.columns or range(int(weights.take(f"{name}.weight_shape")[1]))
        weights.ignore(f"{name}.weight_shape")
        words = word_range(columns, self.bits)
        packed = weights.take(f"{name}.weight_packed", part.rows, words)
        return centred(unpack(packed, self.bits)[:, : len(columns)], self.bits)

    def _zeros(self, weights: Weights, name: str, part: Part) -> torch.Tensor | None:
        """int16 [rows, groups]."""
        stored = weights.take(f"{name}.weight_zero_point", None, part.groups(self.group_size))
        if self.is_packed:
            zeros = unpack(stored.T, self.bits).T
        else:
            zeros = stored.to(torch.int16) + 2 ** (self.bits - 1)
        return zero_points(zeros if part.rows is None else zeros[_slice(part.rows)], self.bits)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
