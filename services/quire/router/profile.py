"""How a policy is put together: filters, scorers and a picker, run by `Profile`.

    kept    = pods that pass all filters
    costs   = what each scorer makes of every pod (lower is better)
    chosen  = the picker's choice among the kept

A policy is a profile for the decode pod and a `PrefillChoice` for the pod that may prefill for it.
Scorers return costs, not scores in [0, 1]: seconds add up, normalised scores need weights to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.router.endpoints import Endpoints, Flags, Floats
    from quire.router.query import RouteQuery


class Filter(Protocol):
    """Says which pods may be chosen."""

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """Those of `kept` that may be chosen."""


class Scorer(Protocol):
    """Says what each pod costs."""

    @property
    def name(self) -> str:
        """As shown by Explain."""

    def cost(self, query: RouteQuery, pods: Endpoints) -> Floats:
        """Lower is better; also for pods that were filtered out."""


class Picker(Protocol):
    """Takes one of the kept pods."""

    def pick(self, costs: Sequence[Floats], kept: Flags, rng: np.random.Generator) -> int:
        """The chosen slot; `kept` has at least one. Earlier costs count before later ones."""


class PrefillChoice(Protocol):
    """Decides whether another pod prefills, once the decode pod is known."""

    def choose(
        self, query: RouteQuery, pods: Endpoints, decode: int, rng: np.random.Generator
    ) -> int | None:
        """The prefill pod's slot; None to prefill on the decode pod."""


@dataclass(frozen=True)
class Choice:
    """What a profile chose, with the costs of all pods."""

    slot: int
    kept: Flags
    costs: tuple[Floats, ...]
    """One array per scorer."""


@dataclass(frozen=True)
class Profile:
    """Filters, scorers (the first decides, the next break its ties) and a picker."""

    filters: tuple[Filter, ...]
    scorers: tuple[Scorer, ...]
    picker: Picker

    def run(self, query: RouteQuery, pods: Endpoints, rng: np.random.Generator) -> Choice | None:
        """Choose a pod; None when none may be chosen."""
        kept = np.ones(len(pods), bool)
        for f in self.filters:
            kept = f.keep(query, pods, kept)
        if not kept.any():
            return None
        costs = tuple(scorer.cost(query, pods) for scorer in self.scorers)
        return Choice(self.picker.pick(costs, kept, rng), kept, costs)


@dataclass(frozen=True)
class Policy:
    """Where a request decodes, and where it is prefilled."""

    name: str
    decode: Profile
    prefill: PrefillChoice
