"""A fleet: its models, their pools of replicas, and the coordinator that keeps them on Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.config.address import check_address, check_port, host_of, is_local
from quire.config.base import check_fields, from_mapping
from quire.config.engine import EngineConfig
from quire.config.logs import LogConfig
from quire.config.option import option
from quire.config.transfer import TransferConfig
from quire.config.values import ConfigError, did_you_mean
from quire.config.worker import ROLES
from quire.config.yaml_file import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_COORDINATOR = "127.0.0.1:9200"
LOCAL_RAY = "local"
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """The coordinator of one fleet. Durations in seconds."""

    fleet: str = option("default", "coordinator")
    """The fleet's name: what runs under it on the same Ray cluster is found again."""
    ray: str = option(LOCAL_RAY, "coordinator")
    """local for a Ray of its own on this machine, auto for the one that runs here, or host:port of
    a cluster's head; this host must be a node of it."""
    ray_cpus: int | None = option(None, "coordinator")
    """CPUs that a Ray of its own offers; those of this machine by default."""
    listen: str = option(DEFAULT_COORDINATOR, "coordinator")
    """Address of its gRPC service. Beyond loopback a cluster token is required."""
    state_dir: str | None = option(None, "coordinator")
    """Folder of what must survive its death; ~/.local/state/quire/FLEET by default."""
    orphan_s: float = option(600.0, "coordinator")
    """An engine whose supervisor has been gone for this long drains and ends."""
    ray_reconnect_s: int = option(600, "coordinator")
    """For how long Ray's processes wait for a lost head before they end. Those that others start
    need RAY_gcs_rpc_server_reconnect_timeout_s themselves."""
    ray_wait_s: float = option(0.0, "coordinator")
    """For how long Ray, and nodes with room for every replica, may take to appear before that is an
    error. Where nodes start beside the coordinator, as pods do, minutes."""
    http_port: int = option(0, "coordinator")
    """Port for /metrics, /healthz and /readyz over HTTP, on the host of `listen`; 0 for none."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_name("fleet", self.fleet)
        for name in ("ray", "listen"):
            value = getattr(self, name)
            if name == "ray" and value in (LOCAL_RAY, "auto"):
                continue
            try:
                check_address(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for name in ("orphan_s", "ray_reconnect_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.ray_wait_s < 0:
            raise ValueError(f"ray_wait_s must not be negative, not {self.ray_wait_s}")
        check_port("http_port", self.http_port)

    @property
    def folder(self) -> Path:
        """Where the state is kept."""
        if self.state_dir is not None:
            return Path(self.state_dir)
        return Path.home() / ".local" / "state" / "quire" / self.fleet

    @property
    def is_local(self) -> bool:
        """Everything runs on this machine: engines need not be reached from elsewhere."""
        return self.ray == LOCAL_RAY


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Equal replicas of a model."""

    name: str = option("", "pool")
    """The pool's name, one of a kind in the fleet; its pods are NAME-0, NAME-1 and so on."""
    role: str = option("both", "pool", choices=ROLES)
    """What its pods are for while others can do the rest."""
    replicas: int = option(1, "pool")
    """How many; `quire scale` changes it while the fleet runs."""
    cpus: float = option(1.0, "pool")
    """CPUs of a replica, all its ranks together."""
    gpus: int = option(0, "pool")
    """GPUs of a replica, all its ranks together. One that no host can hold goes over several."""
    node_label: str = option("", "pool")
    """KEY=VALUE that a node must be labelled with, see `ray start --labels`; any node if empty."""
    port: int = option(0, "pool")
    """Port of a replica's gRPC service; 0 takes a free one. A fixed port allows one per host."""
    http_port: int = option(0, "pool")
    """Port of a replica's /metrics, /healthz and /readyz over HTTP; 0 for none."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_name("pool name", self.name)
        if self.replicas < 0:
            raise ValueError(f"pool {self.name}: replicas must not be negative")
        if self.cpus < 0 or self.gpus < 0 or not (self.cpus or self.gpus):
            raise ValueError(f"pool {self.name}: cpus and gpus must be positive, or one of them 0")
        if self.node_label and not all(self.node_label.partition("=")[::2]):
            raise ValueError(
                f"pool {self.name}: node_label must be KEY=VALUE, not {self.node_label!r}"
            )
        for name in ("port", "http_port"):
            check_port(f"pool {self.name}: {name}", getattr(self, name))

    @property
    def labels(self) -> dict[str, str]:
        """What a node's labels must contain."""
        key, _, value = self.node_label.partition("=")
        return {key: value} if key else {}


@dataclass(frozen=True)
class ModelFleet:
    """One model and its pools."""

    name: str
    """As clients call it."""
    engine: EngineConfig
    pools: tuple[PoolConfig, ...]
    own_engines: Mapping[str, EngineConfig] = field(default_factory=dict)
    """Of pools that differ from it, by their names."""

    def engine_of(self, pool: str) -> EngineConfig:
        """Options of the engines of a pool."""
        return self.own_engines.get(pool, self.engine)


@dataclass(frozen=True)
class Fleet:
    """All that `quire up` reads. Raises ValueError when parts contradict each other."""

    coordinator: CoordinatorConfig
    models: tuple[ModelFleet, ...]
    transfer: TransferConfig = field(default_factory=TransferConfig)
    log: LogConfig = field(default_factory=LogConfig)
    """Of the engines."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: at least one is needed")
        for what, names in (
            ("models", [model.name for model in self.models]),
            ("pools", [pool.name for model in self.models for pool in model.pools]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"two {what} are called {min(twice)}")
        exposed = not is_local(self.coordinator.listen) or not self.coordinator.is_local
        if exposed and not self.transfer.cluster_token:
            raise ValueError(
                "pods on other hosts are reached over the network: a cluster token is needed, "
                "set QUIRE_CLUSTER_TOKEN"
            )

    @property
    def pools(self) -> dict[str, PoolConfig]:
        """Pool name -> pool, over all models."""
        return {pool.name: pool for model in self.models for pool in model.pools}

    def model_of(self, pool: str) -> ModelFleet:
        """The model that a pool belongs to."""
        return next(m for m in self.models if pool in {p.name for p in m.pools})

    @property
    def listen_host(self) -> str | None:
        """Host that the coordinator listens on."""
        return host_of(self.coordinator.listen)


def read_fleet(path: Path, transfer: TransferConfig, name: str | None = None) -> Fleet:
    """A fleet file. What `transfer` holds beside defaults goes over the file's own section, `name`
    over the fleet's.

    Raises ConfigError naming the file and what to change.
    """
    content = read_yaml(path)
    if name is not None and isinstance(content, dict):
        content = content | {"fleet": name}
    try:
        return fleet_from(content, transfer)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def fleet_from(content: Any, transfer: TransferConfig | None = None) -> Fleet:
    """A fleet as YAML or JSON has it. Raises ValueError."""
    top = {str(key).replace("-", "_"): value for key, value in _mapping("fleet file", content)}
    models = top.pop("models", None)
    if not isinstance(models, list):
        raise ValueError("models: a list is needed")
    section = dict(_mapping("transfer", top.pop("transfer", {})))
    log = from_mapping(LogConfig, _options("log", top.pop("log", {})))
    return Fleet(
        coordinator=from_mapping(CoordinatorConfig, top),
        models=tuple(_model(number, raw) for number, raw in enumerate(models)),
        transfer=_joined(section, transfer or TransferConfig()),
        log=log,
    )


def _model(number: int, raw: Any) -> ModelFleet:
    what = f"models[{number}]"
    given = {str(key).replace("-", "_"): value for key, value in _mapping(what, raw)}
    known = ("name", "engine", "pools")
    for key in given.keys() - set(known):
        raise ValueError(f"{what}: unknown key {key!r}{did_you_mean(key, known)}")
    try:
        shared = _options("engine", given.get("engine", {}))
        engine = from_mapping(EngineConfig, shared)
        pools = given.get("pools")
        if not isinstance(pools, list) or not pools:
            raise ValueError("pools: a list of at least one is needed")
        parsed, own = [], {}
        for raw_pool in pools:
            options = _options("pool", raw_pool)
            differing = options.pop("engine", None)
            parsed.append(pool := from_mapping(PoolConfig, options))
            if differing is not None:
                over = shared | _options(f"pool {pool.name}: engine", differing)
                own[pool.name] = from_mapping(EngineConfig, over)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return ModelFleet(str(given.get("name", engine.model)), engine, tuple(parsed), own)


def _options(what: str, value: Any) -> dict[str, Any]:
    return {str(key).replace("-", "_"): given for key, given in _mapping(what, value)}


def _joined(section: Mapping[str, object], over: TransferConfig) -> TransferConfig:
    """A section of the file under what came from elsewhere."""
    plain = TransferConfig()
    changed = {
        f.name: getattr(over, f.name)
        for f in fields(TransferConfig)
        if getattr(over, f.name) != getattr(plain, f.name)
    }
    return from_mapping(
        TransferConfig, {k.replace("-", "_"): v for k, v in section.items()} | changed
    )


def _mapping(what: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: a mapping is needed, not {value!r}")
    return value.items()


def _check_name(what: str, name: str) -> None:
    if not name or not set(name) <= _NAME_CHARACTERS or name.strip("-") != name:
        raise ValueError(
            f"{what} must be of lower-case letters, digits and inner dashes, not {name!r}"
        )
