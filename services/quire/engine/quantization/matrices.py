"""Where a model takes the matrices of its linear layers from, whatever they are stored as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.quantization.format import Part

if TYPE_CHECKING:
    import torch

    from quire.engine.models.weights import Weights
    from quire.engine.quantization.config import Quantization
    from quire.engine.quantization.format import Format
    from quire.kernels.quantized import Matrix

HEAD = "lm_head"


@dataclass(frozen=True)
class Matrices:
    """Matrices of a checkpoint, of floats or of integers."""

    weights: Weights
    quantization: Quantization | None

    def take(self, layer: str, rows: range | None = None, columns: range | None = None) -> Matrix:
        """The matrix of a layer, or some rows or columns of it.

        Raises ValueError, naming the layer, when it is missing or does not fit.
        """
        format_ = self._format_of(layer)
        if format_ is None:
            return self.weights.take(f"{layer}.weight", rows, columns)
        try:
            return format_.read(self.weights, layer, Part(rows, columns))
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error

    def head(self, tied: torch.Tensor | None, rows: range) -> Matrix:
        """Some rows of the head; `tied` are those of the embedding when it serves for both."""
        if self._format_of(HEAD) is not None:
            return self.take(HEAD, rows)
        matrix = self.weights.take(f"{HEAD}.weight", rows) if tied is None else tied
        rounding = None if self.quantization is None else self.quantization.head
        return matrix if rounding is None else rounding.round(matrix)

    def _format_of(self, layer: str) -> Format | None:
        return None if self.quantization is None else self.quantization.format_of(layer)
