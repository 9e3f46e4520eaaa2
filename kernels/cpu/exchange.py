"""Where a recorded program stops for the other ranks of its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from quire.kernels.group import Group


@dataclass(frozen=True)
class Exchange:
    """Before operation `before` runs, the rows of `part` of every rank are put into `parts`.

    Holds the memory, not the handles: it is used again by operations recorded later.
    """

    before: int
    group: Group
    domain: int
    part: np.ndarray  # [rows, columns] float32, no gaps
    parts: np.ndarray  # [rows, size * columns]: storage for [size][rows][columns]
    is_for_all: bool
    """Every rank reads what was exchanged; otherwise rank 0 alone."""

    def run(self, num_rows: int) -> None:
        """Exchange the first `num_rows` rows. Of what is for all, one row at least: whoever has it
        knows that every rank has done what comes before it, such as writing its KV blocks."""
        if not num_rows and not self.is_for_all:
            return
        num_rows = max(num_rows, 1)
        part, parts = (array[:num_rows].reshape(-1) for array in (self.part, self.parts))
        if self.is_for_all:
            self.group.all_gather(parts, part)
        else:
            self.group.gather(parts, part)
