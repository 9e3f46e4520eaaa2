"""Pickers: which of the pods that passed the filters is taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quire.router.endpoints import Flags, Floats


@dataclass(frozen=True)
class Lowest:
    """The lowest cost; ties, and costs that differ by no more than `tie`, are broken randomly.

    Randomly, because replicas that know the same would all take the same pod.
    """

    tie: float = 0.0

    def pick(self, costs: Sequence[Floats], kept: Flags, rng: np.random.Generator) -> int:
        """One of the kept slots."""
        (slots,) = np.nonzero(kept)
        return lowest(costs, slots, self.tie, rng)


@dataclass(frozen=True)
class LowestOfTwo:
    """The better of two random ones: nearly as good as the best of all, and it does not herd."""

    def pick(self, costs: Sequence[Floats], kept: Flags, rng: np.random.Generator) -> int:
        """One of the kept slots."""
        (slots,) = np.nonzero(kept)
        if len(slots) > 2:
            slots = rng.choice(slots, 2, replace=False)
        return lowest(costs, slots, 0.0, rng)


@dataclass
class Next:
    """Each in turn, by slot."""

    last: int = field(default=-1)

    def pick(self, costs: Sequence[Floats], kept: Flags, rng: np.random.Generator) -> int:
        """The kept slot after the last one taken."""
        (slots,) = np.nonzero(kept)
        at = int(np.searchsorted(slots, self.last, side="right")) % len(slots)
        self.last = int(slots[at])
        return self.last


def lowest(
    costs: Sequence[Floats], slots: NDArray[np.int64], tie: float, rng: np.random.Generator
) -> int:
    """One of the slots with the lowest first cost, among them of the second, and so on."""
    for column in costs:
        values = column[slots]
        slots = slots[values <= values.min() + tie]
    return int(slots[0] if len(slots) == 1 else slots[rng.integers(len(slots))])
