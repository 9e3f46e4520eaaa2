"""GPTQ checkpoints (AutoGPTQ, GPTQModel).

qweight  int32 [K / per word, N]       values count from 0; a word is a run of k
scales   [groups, N]
qzeros   int32 [groups, N / per word]  the plain format holds every zero point less one
g_idx    int32 [K]                     group of each k, in any order with desc_act
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.quantization.format import column_order
from quire.engine.quantization.words import centred, unpack, word_range, zero_points
from quire.kernels.quantized import QuantizedWeight

if TYPE_CHECKING:
    import torch

    from quire.engine.models.weights import Weights
    from quire.engine.quantization.format import Part

ONES = {4: 0x11111111, 8: 0x01010101}
"""A word that holds one in every place."""


@dataclass(frozen=True)
class Gptq:
    """One layer's settings."""

    bits: int
    group_size: int | None
    permutes: bool
    """desc_act: columns were quantized in order of their weight in the activations."""
    zeros_less_one: bool
    """The plain checkpoint format, not gptq_v2."""

    def read(self, weights: Weights, name: str, part: Part) -> QuantizedWeight:
        """The matrix of the layer `name`."""
        words = None if part.columns is None else word_range(part.columns, self.bits)
        packed = weights.take(f"{name}.qweight", words, part.rows)
        values = centred(unpack(packed.T, self.bits), self.bits)
        group_size = self.group_size or values.shape[1]
        order = None
        if self.permutes:
            order = column_order(weights.take(f"{name}.g_idx"), group_size)
            values = values if order is None else values[:, order]
        else:
            weights.ignore(f"{name}.g_idx")
        groups = part.groups(self.group_size)
        return QuantizedWeight(
            values=values,
            scales=weights.take(f"{name}.scales", groups, part.rows).T.float(),
            zeros=self._zeros(weights.take(f"{name}.qzeros", groups), part.rows),
            bits=self.bits,
            group_size=group_size,
            order=order,
        )

    def _zeros(self, words: torch.Tensor, rows: range | None) -> torch.Tensor | None:
        """int16 [rows, groups]."""
        if self.zeros_less_one:
            # with carries: writers take one from each place of a word by one subtraction
            words = words + ONES[self.bits]
        zeros = unpack(words, self.bits).T
        return zero_points(zeros if rows is None else zeros[rows.start : rows.stop], self.bits)
