"""Options of the router."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.address import named_address
from quire.config.base import check_fields
from quire.config.discovery import DiscoveryConfig
from quire.config.option import option
from quire.config.worker import check_listen

POLICY_NAMES = ("cost", "prefix", "least_load", "power_of_two", "round_robin", "session")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How pods are chosen. Validated at construction.

    Rates (prompt tokens per second, token latency, transfer speed) are no options: pods measure
    and report them.
    """

    routing_policy: str = option("cost", "router", choices=POLICY_NAMES)
    """How a pod is chosen: cost (least expected time to first token and harm to others), prefix,
    least_load, power_of_two, round_robin or session."""
    work_price: float = option(1.0, "router")
    """Seconds of time to first token that a second of prefill work is worth to the requests that
    come next."""
    stall_price: float = option(0.01, "router")
    """Seconds of time to first token that a second's delay of one running stream is worth."""
    tie_s: float = option(0.001, "router")
    """Pods whose costs differ by less, in seconds, are equal: one is taken at random."""
    prefill_chunk_tokens: int = option(512, "router")
    """Prompt tokens that a prefill pod computes, then pushes, at once."""
    prefill_round_trip_s: float = option(0.002, "router")
    """Seconds for asking a prefill pod and hearing of it."""
    min_remote_prefill_tokens: int = option(64, "router")
    """Uncached prompt tokens below which a prompt is never prefilled on another pod; a number
    above every prompt's length turns disaggregation off."""
    in_flight_ttl_s: float = option(2.0, "router")
    """Seconds for which a prompt counts as cached where it was sent, without the pod's word."""
    stale_after_s: float = option(2.0, "router")
    """Seconds of silence after which a pod is suspected and its cache counts as unknown."""
    max_decisions: int = option(4096, "router")
    """Latest decisions kept to be explained."""
    routing_seed: int | None = option(None, "router")
    """Seed for breaking ties, to repeat a run; random by default."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("work_price", "stall_price", "tie_s", "prefill_round_trip_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("in_flight_ttl_s", "stale_after_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("prefill_chunk_tokens", "max_decisions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RouterServerConfig(DiscoveryConfig):
    """Where a router process listens, and whom it routes to."""

    listen: str = option("127.0.0.1:9100", "server")
    """Address of its gRPC service, host:port or unix:/path. Beyond loopback a cluster token is
    required."""
    http_port: int = option(0, "server")
    """Port for /metrics, /healthz and /readyz over HTTP, on the host of --listen; 0 for none."""
    pod: tuple[str, ...] = option((), "server")
    """gRPC address of a worker, several are allowed. NAME=ADDRESS gives it a name; without, the
    address is its name. Gateways must call it the same."""

    deletion_cost: bool = option(False, "server")
    """Write into each pod of --kubernetes-service how busy it is, so that a ReplicaSet that scales
    down takes the idlest."""
    readiness_gate: bool = option(False, "server")
    """Set the condition quire/routed of each pod of --kubernetes-service once it is routed to, for
    readiness gates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("deletion_cost", "readiness_gate"):
            if getattr(self, name) and not self.kubernetes_service:
                raise ValueError(f"{name} is of pods found by kubernetes_service")
        check_listen(self.listen, self.http_port)
        if len(self.pods) < len(self.pod):
            raise ValueError("pod: two pods have the same name")

    @property
    def pods(self) -> dict[str, str]:
        """Name -> address."""
        return dict(named_address(text) for text in self.pod)
