"""Scenarios as data: which requests, how long, how they arrive, what counts as good.

A scenario is a YAML file (see scenarios/). Unknown keys are errors. A length, in tokens, is a
number, [low, high] for a uniform draw, or {mean, sigma, min, max} for a log-normal one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from quire.config.values import ConfigError, did_you_mean

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

FOLDER = Path(__file__).parent / "scenarios"
PROCESSES = ("poisson", "gamma", "constant", "trace", "closed")

T = TypeVar("T")


@dataclass(frozen=True)
class Length:
    """How many: `low` to `high`, log-normal around `mean` if there is one."""

    low: int
    high: int
    mean: float | None = None
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"a length of {self.low} to {self.high} cannot be")

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.mean is None:
            return rng.randint(self.low, self.high)
        mu = math.log(self.mean) - self.sigma**2 / 2
        return min(max(round(rng.lognormvariate(mu, self.sigma)), self.low), self.high)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Beginnings that requests share: each takes one of `count`, all of `length` tokens."""

    count: int
    length: int


@dataclass(frozen=True, kw_only=True)
class RequestClass:
    """One kind of request. A session of several turns sends its history with each turn."""

    name: str
    share: float = 1.0
    """Of the sessions, relative to the other classes."""
    prefix: Prefix | None = None
    input_len: Length = Length(256, 256)
    """Of each turn's own part."""
    output_len: Length = Length(128, 128)
    turns: Length = Length(1, 1)
    think_s: tuple[float, float] = (0.0, 0.0)
    """Pause before each further turn, uniform."""


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When sessions start."""

    process: str = "poisson"
    request_rate: float = 1.0
    """Sessions per second; open loop, whatever became of earlier ones."""
    burstiness: float = 1.0
    """Shape of the gaps of the gamma process: below 1 is burstier than Poisson."""
    max_concurrency: int | None = None
    """Sessions at once. In a closed loop a new one starts when another ends."""
    dataset_path: str | None = None
    """Trace in Mooncake's format: lines of timestamp, input_length, output_length, hash_ids."""
    trace_speedup: float = 1.0

    def __post_init__(self) -> None:
        if self.process not in PROCESSES:
            hint = did_you_mean(self.process, PROCESSES)
            raise ConfigError(f"process must be one of {', '.join(PROCESSES)}{hint}")
        if self.request_rate <= 0 or self.burstiness <= 0 or self.trace_speedup <= 0:
            raise ConfigError("request_rate, burstiness and trace_speedup must be above 0")
        if self.process == "closed" and not self.max_concurrency:
            raise ConfigError("a closed loop needs max_concurrency")
        if self.process == "trace" and self.dataset_path is None:
            raise ConfigError("a trace is read from a file: give dataset_path")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A load and what is expected of a server under it."""

    name: str
    summary: str = ""
    arrivals: Arrivals = Arrivals()
    requests: tuple[RequestClass, ...] = ()
    warm_up_s: float = 5.0
    """Requests due before it is over are sent and not counted."""
    window_s: float = 30.0
    """Requests due in it are counted."""
    cool_down_s: float = 5.0
    """The load goes on for so long behind the window, while its requests are answered."""
    goodput: tuple[str, ...] = ()
    """Objectives such as ttft:500 itl:80, in ms."""

    @property
    def total_s(self) -> float:
        """From the first to the last start."""
        return self.warm_up_s + self.window_s + self.cool_down_s

    def with_arrivals(self, **changes: Any) -> Scenario:
        """The same at another rate, concurrency or trace; None leaves a value as it is."""
        given = {k: v for k, v in changes.items() if v is not None}
        return replace(self, arrivals=replace(self.arrivals, **given))


def scenario_names() -> list[str]:
    """The scenarios that are here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_scenario(name: str) -> Scenario:
    """A scenario by name or by file. Raises ConfigError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        known = ", ".join(scenario_names())
        raise ConfigError(f"scenario {name!r}: {error}; there are {known}") from None
    try:
        return parse_scenario(path.stem, data)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_scenario(name: str, data: Mapping[str, Any]) -> Scenario:
    """A scenario from what YAML gave. Raises ConfigError, TypeError, ValueError."""
    data = dict(data)
    arrivals = _build(Arrivals, data.pop("arrivals", {}))
    requests = tuple(_request_class(entry) for entry in data.pop("requests", ()))
    goodput = tuple(data.pop("goodput", ()))
    values = {"name": name, "arrivals": arrivals, "requests": requests, "goodput": goodput}
    scenario = _build(Scenario, data | values)
    if arrivals.process != "trace" and not requests:
        raise ConfigError("requests: at least one class is needed")
    if scenario.window_s <= 0:
        raise ConfigError("window_s must be above 0")
    return scenario


def _request_class(entry: Mapping[str, Any]) -> RequestClass:
    values = dict(entry)
    for key in ("input_len", "output_len", "turns"):
        if key in values:
            values[key] = _length(values[key])
    if "prefix" in values:
        values["prefix"] = _build(Prefix, values["prefix"])
    if "think_s" in values:
        low, high = values["think_s"]
        values["think_s"] = (float(low), float(high))
    return _build(RequestClass, values)


def _length(value: Any) -> Length:
    if isinstance(value, int):
        return Length(value, value)
    if isinstance(value, list):
        low, high = value
        return Length(int(low), int(high))
    given = dict(value)
    return Length(given.pop("min"), given.pop("max"), given.pop("mean"), given.pop("sigma"))


def _build(owner: type[T], values: Mapping[str, Any]) -> T:
    known = [f.name for f in fields(owner)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{did_you_mean(key, known)}")
    return owner(**values)
