"""A B C A B C ...: each in turn while the others are stopped; medians, spread, ratios."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.compare.process import Frozen


class Contestant(Protocol):
    """Something that is measured beside others."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def group(self) -> Frozen:
        """Its processes."""


C = TypeVar("C", bound=Contestant)


@dataclass
class Series:
    """The values of one figure for one contestant, in the order of the rounds."""

    values: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """min, median, max and all values."""
        return {
            "min": min(self.values),
            "median": median(self.values),
            "max": max(self.values),
            "values": self.values,
        }


def alternate(
    contestants: Sequence[C], repeats: int, measure: Callable[[C, int], dict[str, float]]
) -> dict[str, dict[str, Series]]:
    """figure -> contestant -> values of `repeats` rounds, after a round that does not count.

    Contestants come frozen and are left frozen; the order of a round is turned each time, so that
    none always follows the same neighbour.
    """
    figures: dict[str, dict[str, Series]] = {}
    for number in range(repeats + 1):
        turned = contestants if number % 2 else contestants[::-1]
        for contestant in turned:
            contestant.group.thaw()
            values = measure(contestant, number)
            contestant.group.freeze()
            for figure, value in values.items() if number else ():
                by_name = figures.setdefault(figure, {c.name: Series() for c in contestants})
                by_name[contestant.name].values.append(value)
    return figures


def ratios(
    by_name: dict[str, Series], ours: str, *, higher_is_better: bool = True
) -> list[dict[str, Any]]:
    """For each other contestant: how many times better ours is. Ratios are of the same round; the
    median, least and greatest of them."""
    rows = []
    for name, series in by_name.items():
        if name == ours:
            continue
        pairs = zip(by_name[ours].values, series.values, strict=True)
        each = [a / b if higher_is_better else b / a for a, b in pairs]
        rows.append({"peer": name, "ratio": median(each), "low": min(each), "high": max(each)})
    return rows
