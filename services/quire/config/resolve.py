"""Where each value comes from: defaults < YAML file < environment < command line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from quire.config.base import ENV_PREFIX, options_of
from quire.config.values import ConfigError, did_you_mean
from quire.config.vllm import IGNORED, REFUSED, judge
from quire.config.yaml_file import read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from quire.config.base import Option

T = TypeVar("T")

CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
READ_ELSEWHERE = (CONFIG_VARIABLE, "QUIRE_CPU_ISA")
"""Variables with our prefix that are not options of a config class."""
MASK = "***"

# Kubernetes describes a service named "quire" to every pod in such variables, QUIRE_PORT among
# them: tcp://10.0.0.7:8000 is not a port, and none of this is meant for us.
_SERVICE_LINK = re.compile(
    r"QUIRE_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)"
)
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True)
class Given:
    """A value somebody gave, and where."""

    value: object
    origin: str
    """As shown to people: `--port`, `QUIRE_PORT`, `serve.yaml`."""
    typed: bool = False
    """On the command line, in front of the person's eyes."""


@dataclass(frozen=True)
class Resolved:
    """Configs built from all sources."""

    parts: Mapping[type[Any], object]
    origins: Mapping[str, str]
    """Field name -> where its value comes from, for every value that is not a default."""
    warnings: tuple[str, ...] = ()

    def get(self, owner: type[T]) -> T:
        """The config of this class. Raises KeyError when it was not asked for."""
        return cast("T", self.parts[owner])

    def dump(self) -> str:
        """The effective values as a YAML file that says where each came from, secrets masked."""
        return "".join(_dump(self.parts, self.origins))


@dataclass
class Sources:
    """What was given, by field name, later sources replacing earlier ones."""

    owners: tuple[type[Any], ...]
    given: dict[str, Given] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Option]:
        """Field name -> option, over all classes."""
        return {o.name: o for owner in self.owners for o in options_of(owner)}

    def add_file(self, path: Path) -> None:
        """Take the keys of a YAML file: flag names, with - or _. Raises ConfigError."""
        by_key = {key: o for o in self.options.values() for key in o.keys}
        seen: dict[str, str] = {}
        for raw, value in _read_options(path).items():
            key = str(raw).replace("-", "_")
            if key in IGNORED or key in REFUSED:
                self._note(judge(key, value))
                continue
            option = by_key.get(key)
            if option is None:
                raise ConfigError(f"{path}: unknown key {raw!r}{did_you_mean(key, by_key)}")
            if option.name in seen:
                raise ConfigError(f"{path}: {raw!r} repeats {seen[option.name]!r}")
            seen[option.name] = str(raw)
            try:
                self.given[option.name] = Given(option.check(value), str(path))
            except ValueError as error:
                raise ConfigError(f"{path}: {raw}: {error}") from None

    def add_environment(self, environ: Mapping[str, str], known: Iterable[str] = ()) -> None:
        """Take `QUIRE_*` variables; warn about those that are neither options nor `known`.

        Raises ConfigError on a bad value.
        """
        by_variable = {v: o for o in self.options.values() for v in reversed(o.variables)}
        for variable, text in environ.items():
            if not variable.startswith(ENV_PREFIX) or _is_service_link(variable, text):
                continue
            option = by_variable.get(variable)
            if option is not None:
                try:
                    self.given[option.name] = Given(option.parse(text), variable)
                except ValueError as error:
                    shown = "the value is not usable" if option.spelling.secret else error
                    raise ConfigError(f"{variable}: {shown}") from None
            elif variable not in known and variable not in READ_ELSEWHERE:
                hint = did_you_mean(variable, [*by_variable, *READ_ELSEWHERE])
                self._note(f"environment variable {variable} is not an option{hint}")

    def add_flag(self, option: Option, flag: str, values: list[str]) -> None:
        """Take a flag; one of a list is added to those before it. Raises ConfigError."""
        try:
            if option.many:
                value: object = tuple(p for text in values for p in _as_tuple(option, text))
                before = self.given.get(option.name)
                if before is not None and before.typed:
                    value = (*cast("tuple[object, ...]", before.value), *cast("Any", value))
            else:
                value = option.parse(values[0])
        except ValueError as error:
            raise ConfigError(f"{flag}: {error}") from None
        self.given[option.name] = Given(value, flag, typed=True)

    def add_foreign(self, name: str, flag: str, value: object) -> None:
        """Take a flag of vLLM that has no field here. Raises ConfigError when it is refused."""
        try:
            self._note(judge(name, value))
        except ConfigError as error:
            raise ConfigError(str(error).replace(name, flag, 1)) from None

    def resolve(self) -> Resolved:
        """Build the configs. Raises ConfigError, naming the sources of what is contradictory."""
        parts = {owner: self._build(owner) for owner in self.owners}
        origins = {name: given.origin for name, given in self.given.items()}
        return Resolved(parts, origins, tuple(self.warnings))

    def _build(self, owner: type[Any]) -> object:
        own = {o.name for o in options_of(owner)}
        values = {name: given.value for name, given in self.given.items() if name in own}
        try:
            return owner(**values)
        except ValueError as error:
            text = str(error)
            mentioned = {
                f"{name} is from {given.origin}"
                for name, given in self.given.items()
                if not given.typed and re.search(rf"\b{name}\b", text)
            }
            raise ConfigError("; ".join([text, *sorted(mentioned)])) from None

    def _note(self, warning: str | None) -> None:
        if warning is not None:
            self.warnings.append(warning)


def _as_tuple(option: Option, text: str) -> tuple[object, ...]:
    """One argument of a list flag. A key or name may hold a comma; numbers are split at them."""
    return (text,) if option.kind is str else cast("tuple[object, ...]", option.parse(text))


def _is_service_link(variable: str, text: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(variable) or _SERVICE_URL.match(text))


def _read_options(path: Path) -> dict[Any, Any]:
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping of option names to values is needed")
    return content


def _dump(parts: Mapping[type[Any], object], origins: Mapping[str, str]) -> Iterator[str]:
    group = None
    options = [(o, config) for owner, config in parts.items() for o in options_of(owner)]
    order = list(dict.fromkeys(o.spelling.group for o, _ in options))
    for o, config in sorted(options, key=lambda pair: order.index(pair[0].spelling.group)):
        if o.spelling.group != group:
            yield f"{'' if group is None else chr(10)}# {o.spelling.group}\n"
            group = o.spelling.group
        value = getattr(config, o.name)
        if o.spelling.secret and value:
            value = [MASK] * len(value) if o.many else MASK
        line = f"{o.flags[0][2:]}: {json.dumps(value, ensure_ascii=False)}"
        yield f"{line:<46} # {origins.get(o.name, 'default')}\n"
