"""Options of the processes that `quire serve` starts beside the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.base import check_fields
from quire.config.option import option


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """How many workers and routers, and what the workers are for."""

    replicas: int = option(1, "processes")
    """Worker processes to start, each with the whole model."""
    prefill: int = option(0, "processes")
    """Worker processes that compute prompts, and push their KV blocks to those of --decode."""
    decode: int = option(0, "processes")
    """Worker processes that answer requests with prompts from those of --prefill; 1 if only
    --prefill is given. Together they take the place of --replicas."""
    routers: int = option(0, "processes")
    """Router processes to start; with 0 the HTTP server's own process routes."""

    ray: str | None = option(None, "processes")
    """Have Ray place and supervise the workers: local, as --ray alone says, starts a Ray for this
    server; auto uses the one that runs on this host, host:port that of a cluster's head."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ray is not None and self.routers:
            raise ValueError("routers are not started with --ray: start quire router beside it")
        for name in ("prefill", "decode", "routers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.replicas < 1:
            raise ValueError(f"replicas must be at least 1, not {self.replicas}")
        if self.decode and not self.prefill:
            raise ValueError(
                "decode workers need --prefill; --replicas starts workers that do both"
            )

    @property
    def roles(self) -> list[str]:
        """Role of each worker: equal ones that do both, or prefill workers and decode workers."""
        if not self.prefill:
            return ["both"] * self.replicas
        return ["prefill"] * self.prefill + ["decode"] * max(self.decode, 1)
