"""Numbers from a worker's metrics page: sums over labels, and quantiles of histograms."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from quire.telemetry import metrics as m

if TYPE_CHECKING:
    from quire.telemetry.instruments import CounterDeclaration, HistogramDeclaration

COUNTERS = (
    m.PROMPT_TOKENS, m.GENERATION_TOKENS, m.PREFIX_CACHE_QUERIES, m.PREFIX_CACHE_HITS,
)  # fmt: skip
HISTOGRAMS = (m.TIME_TO_FIRST_TOKEN, m.INTER_TOKEN_LATENCY)
_BYTES = m.KV_TRANSFER_BYTES.exported_names[0]
_BUCKETS = {d.name + "_bucket": d.name for d in HISTOGRAMS}
_WANTED = (*(d.exported_names[0] for d in COUNTERS), *_BUCKETS, _BYTES)


@dataclass(frozen=True)
class Page:
    """What is needed of one page; counts since the worker's start, or between two pages."""

    at: float = 0.0
    """Seconds, monotonic, of this process; of a difference the seconds between."""
    counts: Counter[str] = field(default_factory=Counter)
    """Counter's exported name, or "sent" and "received" for bytes of KV blocks."""
    buckets: dict[str, Counter[float]] = field(default_factory=dict)
    """Histogram -> upper bound -> observations up to it."""

    @classmethod
    def parse(cls, text: str, at: float) -> Page:
        """Raises ValueError on what is no metrics page."""
        counts: Counter[str] = Counter()
        buckets: defaultdict[str, Counter[float]] = defaultdict(Counter)
        lines = "".join(f"{x}\n" for x in text.splitlines() if x.startswith(_WANTED))
        for family in text_string_to_metric_families(lines):
            for sample in family.samples:
                if sample.name in _BUCKETS:
                    bound = float(sample.labels["le"])
                    buckets[_BUCKETS[sample.name]][bound] += int(sample.value)
                elif sample.name == _BYTES:
                    counts[sample.labels["direction"]] += int(sample.value)
                else:
                    counts[sample.name] += int(sample.value)
        return cls(at, counts, dict(buckets))

    def since(self, before: Page) -> Page:
        """What happened between two pages of the same process."""
        counts = Counter({k: v - before.counts[k] for k, v in self.counts.items()})
        buckets = {}
        for name, own in self.buckets.items():
            old = before.buckets.get(name, Counter())
            buckets[name] = Counter({le: n - old[le] for le, n in own.items()})
        return Page(self.at - before.at, counts, buckets)

    def count(self, declaration: CounterDeclaration) -> int:
        """A counter."""
        return self.counts[declaration.exported_names[0]]

    def quantile(self, declaration: HistogramDeclaration, q: float) -> float | None:
        """As Prometheus interpolates it, in seconds; None without observations."""
        below, lower = 0, 0.0
        bounds = sorted(self.buckets.get(declaration.name, Counter()).items())
        if not bounds or bounds[-1][1] <= 0:
            return None
        rank = q * bounds[-1][1]
        for bound, count in bounds:
            if count >= rank and count > below:
                if bound == float("inf"):
                    return lower
                return lower + (bound - lower) * (rank - below) / (count - below)
            below, lower = count, bound
        return lower
