"""Counters, gauges and histograms that are cheap enough for every token.

Data is kept once, in plain Python numbers, and turned into Prometheus families when scraped; a
metric with an alias is emitted under both names from the same numbers. prometheus_client's own
histogram takes a lock and walks the buckets on each observation, ten times the price of this one.

One thread writes a given child; any thread may scrape, and may then see a histogram's sum one
observation ahead of its buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Component = Literal["engine", "gateway", "router", "coordinator"]
Kind = Literal["counter", "gauge", "histogram", "info"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ENGINE_LABELS = ("model_name", "engine")
"""Labels of every engine metric, as in vLLM: the served name, and the replica's number."""


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add an amount, not negative."""
        self.value += amount


class Gauge:
    """A number that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """Replace the value."""
        self.value = value

    def inc(self, amount: float = 1.0) -> None:
        """Add an amount."""
        self.value += amount

    def dec(self, amount: float = 1.0) -> None:
        """Take an amount away."""
        self.value -= amount


class Histogram:
    """Counts of observations per bucket. Bucket i holds values in (bounds[i-1], bounds[i]]."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one is for everything above the bounds
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Record a value, `count` times: all sequences of a step share one token latency."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    @property
    def total(self) -> int:
        """Observations so far."""
        return sum(self.counts)


class Info:
    """Facts about the process, as the labels of a gauge that is 1. Nothing is shown before `set`.

    Setting again replaces the facts.
    """

    __slots__ = ("facts",)

    def __init__(self) -> None:
        self.facts: dict[str, str] | None = None

    def set(self, **facts: object) -> None:
        """Name every label of the declaration; the collector raises KeyError on a missing one."""
        self.facts = {name: str(value) for name, value in facts.items()}


C = TypeVar("C", Counter, Gauge, Histogram, Info)


@dataclass(frozen=True, kw_only=True)
class Declaration(Generic[C]):
    """One metric. `name` is without the `_total` that Prometheus adds to counters."""

    kind: ClassVar[Kind]

    name: str
    help: str
    component: Component
    unit: str = ""
    labels: tuple[str, ...] = ()
    """Labels beside those common to the component."""
    values: tuple[tuple[str, ...], ...] = ()
    """Known values per label, in order; exported as 0 from the start, so that rates see them."""
    aliases: tuple[str, ...] = ()
    """Other names under which the same data is exported."""
    alias_labels: tuple[tuple[str, str], ...] = ()
    """Labels that have another name there: (ours, theirs)."""

    def new(self) -> C:
        """An instrument without observations."""
        raise NotImplementedError

    @property
    def exported_names(self) -> tuple[str, ...]:
        """Sample names without histogram suffixes, ours first."""
        suffix = "_total" if self.kind == "counter" else ""
        return tuple(name + suffix for name in (self.name, *self.aliases))


class CounterDeclaration(Declaration[Counter]):
    """A counter."""

    kind = "counter"

    def new(self) -> Counter:
        """A counter at 0."""
        return Counter()


class GaugeDeclaration(Declaration[Gauge]):
    """A gauge."""

    kind = "gauge"

    def new(self) -> Gauge:
        """A gauge at 0."""
        return Gauge()


@dataclass(frozen=True, kw_only=True)
class HistogramDeclaration(Declaration[Histogram]):
    """A histogram with fixed, rising upper bounds; +Inf is implied."""

    kind = "histogram"

    buckets: tuple[float, ...]

    def new(self) -> Histogram:
        """A histogram without observations."""
        return Histogram(self.buckets)


class InfoDeclaration(Declaration[Info]):
    """A gauge that is always 1; what it says is in its labels."""

    kind = "info"

    def new(self) -> Info:
        """An info without facts."""
        return Info()


class Instruments(Collector):
    """The live metrics of one component of a process, registered for scraping.

    `const_labels` are the values of the labels common to the component: `model_name` and `engine`
    for an engine, none for a gateway or router. Raises ValueError when they are not exactly these.
    """

    def __init__(
        self,
        component: Component,
        declarations: tuple[Declaration[Any], ...],
        registry: CollectorRegistry,
        const_labels: Mapping[str, str] | None = None,
    ) -> None:
        self._const = dict(const_labels or {})
        expected = ENGINE_LABELS if component == "engine" else ()
        if tuple(self._const) != expected:
            raise ValueError(f"labels of {component} metrics are {expected}, not {self._const}")
        self._children: dict[Declaration[Any], dict[tuple[str, ...], Any]] = {}
        for declaration in declarations:
            if declaration.component == component:
                known = product(*declaration.values) if declaration.values else ()
                self._children[declaration] = {values: declaration.new() for values in known}
                if not declaration.labels:
                    self._children[declaration][()] = declaration.new()
        registry.register(self)

    def get(self, declaration: Declaration[C], *label_values: str) -> C:
        """The instrument for these label values, in the declaration's order, created if new.

        Keep the result where it is used for every token. Raises KeyError when the metric belongs
        to another component, ValueError when the number of labels is wrong.
        """
        expected = 0 if declaration.kind == "info" else len(declaration.labels)
        if len(label_values) != expected:
            raise ValueError(f"{declaration.name} has labels {declaration.labels}")
        children = self._children[declaration]
        child: C | None = children.get(label_values)
        if child is None:
            child = children[label_values] = declaration.new()
        return child

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Every metric, under its own name and then under its aliases."""
        for declaration, children in self._children.items():
            renamed = dict(declaration.alias_labels)
            labels = (*self._const, *declaration.labels)
            yield self._family(declaration, declaration.name, labels, children)
            for alias in declaration.aliases:
                theirs = tuple(renamed.get(label, label) for label in labels)
                yield self._family(declaration, alias, theirs, children)

    def _family(
        self,
        declaration: Declaration[Any],
        name: str,
        labels: tuple[str, ...],
        children: dict[tuple[str, ...], Any],
    ) -> Metric:
        make, add = _FAMILIES[declaration.kind]
        family = make(name, declaration.help, labels=labels)
        const = tuple(self._const.values())
        for values, child in list(children.items()):
            if isinstance(child, Info):
                if child.facts is None:
                    continue
                values = tuple(child.facts[label] for label in declaration.labels)
            add(family, [*const, *values], child)
        return family


def _add_value(family: Any, labels: list[str], child: Counter | Gauge) -> None:
    family.add_metric(labels, child.value)


def _add_info(family: Any, labels: list[str], _: Info) -> None:
    family.add_metric(labels, 1)


def _add_histogram(family: Any, labels: list[str], child: Histogram) -> None:
    les = [floatToGoString(le) for le in (*child.bounds, float("inf"))]  # type: ignore[no-untyped-call]
    family.add_metric(labels, list(zip(les, accumulate(child.counts), strict=True)), child.sum)


_FAMILIES: dict[Kind, tuple[Callable[..., Metric], Callable[[Any, list[str], Any], None]]] = {
    "counter": (CounterMetricFamily, _add_value),
    "gauge": (GaugeMetricFamily, _add_value),
    "histogram": (HistogramMetricFamily, _add_histogram),
    "info": (GaugeMetricFamily, _add_info),
}


class _ProcessOf(Collector):
    """CPU time, memory and file descriptors of an engine's process, with the engine's number."""

    def __init__(self, engine: str) -> None:
        self._process = ProcessCollector(namespace="quire_engine", registry=None)
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for family in self._process.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "engine": self._engine})
                for sample in family.samples
            ]
            yield family


def new_registry(component: Component, *, engine: str = "0") -> CollectorRegistry:
    """A registry with the process's CPU time, memory and file descriptors.

    An engine's carry the prefix `quire_engine_` and its number, so that the pages of several can be
    joined to a gateway's.
    """
    registry = CollectorRegistry()
    if component == "engine":
        registry.register(_ProcessOf(engine))
    else:
        ProcessCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry) -> str:
    """The page for CONTENT_TYPE. Pages of different components may be put one after another."""
    return generate_latest(registry).decode()


def join_pages(pages: Sequence[str]) -> str:
    """Pages of the same component as one: a metric is described once, its samples are together."""
    families: dict[str, tuple[list[str], list[str]]] = {}  # name -> description, samples
    for page in pages:
        described: list[str] = []
        samples: list[str] = []
        for line in page.splitlines():
            if line.startswith("# "):
                described, samples = families.setdefault(line.split(" ", 3)[2], ([], []))
                if line not in described:
                    described.append(line)
            else:
                samples.append(line)
    lines = (line for described, samples in families.values() for line in described + samples)
    return "".join(line + "\n" for line in lines)
