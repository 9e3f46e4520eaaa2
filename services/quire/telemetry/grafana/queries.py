"""PromQL over declared metrics. A label that a metric has not is an error here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.telemetry.instruments import ENGINE_LABELS, Declaration, HistogramDeclaration

if TYPE_CHECKING:
    from collections.abc import Mapping

TARGET_LABELS = ("namespace", "pod", "job", "instance", "role")
"""Labels that scraping adds; `role` is prefill, decode, unified, router or gateway."""
DASHBOARD_SCOPE = {"job": "$job", "instance": "$instance"}
"""A dashboard's variables."""


@dataclass(frozen=True)
class Source:
    """Which series are asked for, and over what time."""

    scope: tuple[tuple[str, str], ...] = tuple(DASHBOARD_SCOPE.items())
    """Label -> regular expression, for every metric."""
    model: str | None = "$model"
    """Regular expression for the model of engine metrics."""
    window: str = "$__rate_interval"

    def rate(self, metric: Declaration[Any], *by: str, **where: str) -> str:
        """Sum per second, by labels."""
        assert metric.kind == "counter", metric.name
        return self.summed(self._rate(metric, "", by, where), by)

    def increase(self, metric: Declaration[Any], *by: str, **where: str) -> str:
        """How much a counter grew in the window."""
        assert metric.kind == "counter", metric.name
        return self.summed(self._rate(metric, "", by, where, function="increase"), by)

    def quantile(self, q: float, metric: HistogramDeclaration, *by: str, **where: str) -> str:
        """A quantile of the observations in the window."""
        buckets = self.summed(self._rate(metric, "_bucket", by, where), ("le", *by))
        return f"histogram_quantile({q:g}, {buckets})"

    def mean(self, metric: HistogramDeclaration, *by: str, **where: str) -> str:
        """Mean of the observations in the window."""
        total = self.summed(self._rate(metric, "_sum", by, where), by)
        return f"{total} / ({self.count_rate(metric, *by, **where)} > 0)"

    def count_rate(self, metric: HistogramDeclaration, *by: str, **where: str) -> str:
        """Observations per second."""
        return self.summed(self._rate(metric, "_count", by, where), by)

    def sum_rate(self, metric: HistogramDeclaration, *by: str, **where: str) -> str:
        """Sum of the observed values, per second: seconds of a duration are a share of time."""
        return self.summed(self._rate(metric, "_sum", by, where), by)

    def share_within(self, bound: float, metric: HistogramDeclaration) -> str:
        """Share of observations of at most `bound`. Raises ValueError when that is no bucket's."""
        if bound not in metric.buckets:
            raise ValueError(f"{metric.name} has no bucket up to {bound}")
        le = f"{bound:g}" if bound != int(bound) else f"{bound:.1f}"
        good = self.summed(self._rate(metric, "_bucket", (), {"le": le}), ())
        return f"{good} / ({self.count_rate(metric)} > 0)"

    def gauge(self, function: str, metric: Declaration[Any], *by: str, **where: str) -> str:
        """sum, max, min or avg of a gauge, by labels."""
        assert metric.kind in ("gauge", "info"), metric.name
        grouped = f" by ({', '.join(by)})" if by else ""
        return (
            f"{function}{grouped} ({metric.exported_names[0]}{self._selector(metric, by, where)})"
        )

    def ratio(self, part: Declaration[Any], whole: Declaration[Any], *by: str) -> str:
        """One counter's growth as a share of another's."""
        return f"{self.rate(part, *by)} / ({self.rate(whole, *by)} > 0)"

    @staticmethod
    def summed(expression: str, by: tuple[str, ...]) -> str:
        """The sum by labels."""
        return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"

    def _rate(
        self,
        metric: Declaration[Any],
        suffix: str,
        by: tuple[str, ...],
        where: Mapping[str, str],
        *,
        function: str = "rate",
    ) -> str:
        name = metric.exported_names[0] + suffix
        return f"{function}({name}{self._selector(metric, by, where)}[{self.window}])"

    def _selector(
        self, metric: Declaration[Any], by: tuple[str, ...], where: Mapping[str, str]
    ) -> str:
        common = ENGINE_LABELS if metric.component == "engine" else ()
        known = {*metric.labels, *common, *TARGET_LABELS}
        if isinstance(metric, HistogramDeclaration):
            known.add("le")
        if unknown := {*by, *where} - known:
            raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")
        chosen = dict(self.scope)
        if metric.component == "engine" and self.model is not None:
            chosen["model_name"] = self.model
        matchers = [f'{label}=~"{value}"' for label, value in chosen.items()]
        matchers += [f'{label}=~"{value}"' for label, value in where.items() if label != "le"]
        matchers += [f'le="{where["le"]}"'] if "le" in where else []
        return "{" + ",".join(matchers) + "}" if matchers else ""
