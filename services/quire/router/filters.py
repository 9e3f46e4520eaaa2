"""Filters: which pods may be chosen at all, and which only when nothing better is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from quire.router.endpoints import Endpoints, Flags
    from quire.router.profile import Filter
    from quire.router.query import RouteQuery


class Serving:
    """Connected, loaded, not draining."""

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """Those that take requests."""
        return kept & pods.serving


class SameModel:
    """Serves the model asked for."""

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """Those with the query's model; all when it names none."""
        if not query.model:
            return kept
        if query.model not in pods.model_names:
            return np.zeros_like(kept)
        same: Flags = pods.model == pods.model_names.index(query.model)
        return kept & same


class NotExcluded:
    """Has not failed this request before."""

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """Those the query does not exclude."""
        if not query.exclude:
            return kept
        kept = kept.copy()
        kept[[slot for slot, pod in enumerate(pods.pods) if pod in query.exclude]] = False
        return kept


class Responsive:
    """Has been heard of lately."""

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """Those that are not suspected to hang."""
        return kept & ~pods.suspect


class ForDecode:
    """Has decoding in its role."""

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """Those with a decode weight."""
        return kept & (pods.decode_weight > 0)


class ForPrefill:
    """Has prefilling in its role."""

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """Those with a prefill weight."""
        return kept & (pods.prefill_weight > 0)


@dataclass(frozen=True)
class Prefer:
    """A filter that gives way rather than leave no pod."""

    filter: Filter

    def keep(self, query: RouteQuery, pods: Endpoints, kept: Flags) -> Flags:
        """What the filter keeps, or all when that is none."""
        preferred = self.filter.keep(query, pods, kept)
        return preferred if preferred.any() else kept


ELIGIBLE: tuple[Filter, ...] = (Serving(), SameModel(), NotExcluded())
DECODE_FILTERS: tuple[Filter, ...] = (*ELIGIBLE, Prefer(Responsive()), Prefer(ForDecode()))
"""A pod of another role, or a suspected one, is better than no answer."""
PREFILL_FILTERS: tuple[Filter, ...] = (*ELIGIBLE, Responsive(), ForPrefill())
"""There is always the decode pod itself."""
