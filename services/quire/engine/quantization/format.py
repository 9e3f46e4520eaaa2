"""What every quantized format is to the loader, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from quire.engine.models.weights import Weights
    from quire.kernels.quantized import QuantizedWeight


@dataclass(frozen=True)
class Part:
    """Rows and columns of a matrix [N, K] that a rank holds; None for all."""

    rows: range | None = None
    columns: range | None = None

    def groups(self, group_size: int | None) -> range | None:
        """The groups of columns that the part has; None for all."""
        if self.columns is None or group_size is None:
            return None
        return range(self.columns.start // group_size, -(-self.columns.stop // group_size))


class Format(Protocol):
    """How a checkpoint holds one matrix."""

    @property
    def bits(self) -> int:
        """Of a value."""

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None where a row has one."""

    @property
    def permutes(self) -> bool:
        """Columns of a group may lie anywhere in a row, so that no part of the columns has whole
        groups."""

    def read(self, weights: Weights, name: str, part: Part) -> QuantizedWeight:
        """The matrix of the layer `name`. Raises ValueError for tensors that do not fit."""


def column_order(group_of: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """The order that puts the columns of a group side by side; None where they are so already.

    `group_of` [K] is the group of each column. Raises ValueError where groups are not of one size,
    which no order would help.
    """
    in_order = torch.arange(len(group_of)) // group_size
    if torch.equal(group_of, in_order.to(group_of.dtype)):
        return None
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of[order], in_order.to(group_of.dtype)):
        raise ValueError(f"its columns do not form groups of {group_size} (g_idx)")
    return order
