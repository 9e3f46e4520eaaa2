"""The ranks that compute one model together, as the operations see them.

Each rank holds a part of every large weight and runs the same operations on the same rows:

    embed        a part of the vocabulary each         then a sum over ranks
    qkv, gate/up a part of the columns each            no exchange
    o, down      the matching part of K each           then a sum over ranks
    logits       a part of the vocabulary each         then gathered on rank 0

What is summed is summed in the order of ranks, so that all ranks hold the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


class Group(Protocol):
    """Exchange of activations between ranks. Every rank makes the same calls in the same order.

    Raises RuntimeError when another rank is lost.
    """

    @property
    def rank(self) -> int:
        """This process, 0 .. size - 1."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    def all_gather(self, parts: np.ndarray, part: np.ndarray) -> None:
        """Put `part` [n] of every rank into `parts` [size * n], by rank. Contiguous float32."""

    def gather(self, parts: np.ndarray, part: np.ndarray) -> None:
        """The same, needed on rank 0 alone; elsewhere `parts` means nothing afterwards."""

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in float32, on their device. Waits for every rank even
        where there is nothing to add: each has then done what comes before."""

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The columns of all ranks' [rows, n] side by side, on rank 0; elsewhere `part` itself."""


@dataclass(frozen=True)
class Alone:
    """A group of one: nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def all_gather(self, parts: np.ndarray, part: np.ndarray) -> None:
        """Copy."""
        parts[:] = part

    def gather(self, parts: np.ndarray, part: np.ndarray) -> None:
        """Copy."""
        parts[:] = part

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return part.float()

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return part


ALONE = Alone()


def part_of(total: int, rank: int, size: int) -> range:
    """The run of `total` rows or columns that a rank holds: ceil(total / size), the last less."""
    each = -(-total // size)
    return range(min(rank * each, total), min((rank + 1) * each, total))
