"""What each pool's supervisors are told, and what the cluster must have for it. No I/O."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from quire.coordinator.capacity import Demand
from quire.coordinator.model_files import local_paths
from quire.coordinator.reconcile import Wanted, pod_names
from quire.coordinator.supervisor import Assignment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quire.config.fleet import Fleet, PoolConfig

_LOCAL_HOST = "127.0.0.1"
_CLUSTER = ("cluster_token", "cluster_tls_cert", "cluster_tls_key", "cluster_tls_ca")


def demands(fleet: Fleet, replicas: Mapping[str, int]) -> list[Demand]:
    """What the pools need, with these numbers of replicas."""
    return [demand(fleet, pool, replicas[name]) for name, pool in fleet.pools.items()]


def demand(fleet: Fleet, pool: PoolConfig, replicas: int) -> Demand:
    """What a pool needs, with this number of replicas."""
    ranks = fleet.model_of(pool.name).engine_of(pool.name).tensor_parallel_size
    return Demand(pool.name, replicas, pool.cpus, pool.gpus, pool.labels, ranks)


def wanted(fleet: Fleet, replicas: Mapping[str, int], roles: Mapping[str, str]) -> list[Wanted]:
    """Every replica there should be. `roles` are those of pods that differ from their pool."""
    return [
        Wanted(pod, fleet.model_of(name).name, digest(fleet, pool), roles.get(pod, pool.role))
        for name, pool in fleet.pools.items()
        for pod in pod_names(name, replicas[name])
    ]


def pool_of(fleet: Fleet, pod: str) -> PoolConfig | None:
    """The pool that a pod's name says, None when the fleet has no such pool."""
    return fleet.pools.get(pod.rpartition("-")[0])


def assignment(fleet: Fleet, want: Wanted, term: int) -> Assignment:
    """For the supervisor of one replica."""
    pool = pool_of(fleet, want.name)
    assert pool is not None, "wanted pods have pools"
    cluster = {name: getattr(fleet.transfer, name) for name in _CLUSTER}
    return Assignment(
        fleet=fleet.coordinator.fleet,
        pod=want.name,
        term=term,
        digest=want.digest,
        role=want.role,
        host=_LOCAL_HOST if fleet.coordinator.is_local else None,
        port=pool.port,
        orphan_s=fleet.coordinator.orphan_s,
        drain_s=fleet.model_of(pool.name).engine_of(pool.name).drain_timeout_s,
        options=_worker_options(fleet, pool),
        cluster=cluster,
    )


def digest(fleet: Fleet, pool: PoolConfig) -> str:
    """Of everything that only a restart of the pool's engines can change."""
    parts = {
        "options": _worker_options(fleet, pool),
        "cluster": [getattr(fleet.transfer, name) for name in _CLUSTER],
        "pool": [pool.cpus, pool.gpus, pool.node_label, pool.port],
    }
    text = json.dumps(parts, sort_keys=True).encode()
    return blake2b(text, digest_size=16).hexdigest()


def model_paths(fleet: Fleet) -> Iterator[tuple[str, PoolConfig]]:
    """Files or folders that each node of a pool must have. Raises ValueError."""
    for name, pool in fleet.pools.items():
        engine = fleet.model_of(name).engine_of(name)
        for path in local_paths(asdict(engine)):
            yield path, pool


def _worker_options(fleet: Fleet, pool: PoolConfig) -> dict[str, Any]:
    """What differs from the defaults: those of `quire worker` depend on each other."""
    model = fleet.model_of(pool.name)
    transfer = _changed(fleet.transfer)
    transfer.pop("cluster_token", None)  # goes through the environment
    status = {"http_port": pool.http_port} if pool.http_port else {}
    engine = _changed(model.engine_of(pool.name))
    return engine | transfer | _changed(fleet.log) | status | {"served_model_name": model.name}


def _changed(config: Any) -> dict[str, Any]:
    values = asdict(config)
    return {f.name: values[f.name] for f in fields(config) if values[f.name] != f.default}
