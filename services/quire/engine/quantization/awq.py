"""AWQ checkpoints (AutoAWQ, version "gemm").

qweight  int32 [K, N / 8]       values count from 0; a word is a run of 8 n, see `PLACES`
scales   [groups, N]
qzeros   int32 [groups, N / 8]  likewise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.quantization.words import centred, unpack, zero_points
from quire.kernels.quantized import QuantizedWeight

if TYPE_CHECKING:
    import torch

    from quire.engine.models.weights import Weights
    from quire.engine.quantization.format import Part

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place, from the lowest bits up, of each of a word's eight n."""


@dataclass(frozen=True)
class Awq:
    """One layer's settings."""

    group_size: int | None
    has_zeros: bool
    bits: int = 4
    permutes: bool = False

    def read(self, weights: Weights, name: str, part: Part) -> QuantizedWeight:
        """The matrix of the layer `name`."""
        packed = weights.take(f"{name}.qweight", part.columns)
        values = centred(self._unpack(packed, part.rows), self.bits)
        groups = part.groups(self.group_size)
        zeros = None
        if self.has_zeros:
            words = weights.take(f"{name}.qzeros", groups)
            zeros = zero_points(self._unpack(words, part.rows), self.bits)
        return QuantizedWeight(
            values=values,
            scales=weights.take(f"{name}.scales", groups, part.rows).T.float(),
            zeros=zeros,
            bits=self.bits,
            group_size=self.group_size or values.shape[1],
        )

    def _unpack(self, words: torch.Tensor, rows: range | None) -> torch.Tensor:
        """The columns of unpacked words as rows: uint8 [N, rows of `words`], or some of them."""
        first = 0 if rows is None else rows.start // 8
        last = words.shape[1] if rows is None else -(-rows.stop // 8)
        places = unpack(words[:, first:last], self.bits).view(len(words), -1, 8)
        values: torch.Tensor = places[:, :, list(PLACES)].flatten(1).T
        return values if rows is None else values[rows.start - 8 * first :][: len(rows)]
