"""Float checkpoints, rounded to integers while they load: no calibration, nothing to prepare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.kernels.quantized import quantize

if TYPE_CHECKING:
    import torch

    from quire.engine.models.weights import Weights
    from quire.engine.quantization.format import Part
    from quire.kernels.quantized import QuantizedWeight

GROUP_SIZE = 128


@dataclass(frozen=True)
class Rounded:
    """Symmetric, rounded to nearest, with a scale for every group of columns."""

    bits: int
    group_size: int | None = GROUP_SIZE
    permutes: bool = False

    def read(self, weights: Weights, name: str, part: Part) -> QuantizedWeight:
        """The matrix of the layer `name`."""
        return self.round(weights.take(f"{name}.weight", part.rows, part.columns))

    def round(self, weight: torch.Tensor) -> QuantizedWeight:
        """A float matrix as integers."""
        return quantize(weight, self.bits, self.group_size or weight.shape[1])
