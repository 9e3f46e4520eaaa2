"""Over which hosts the ranks of one engine are spread."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.config.cluster import ClusterConfig

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Spread:
    """The same number of ranks on each host, in order; rank 0 listens, the others connect to it."""

    nodes: int = 1
    host: str = LOOPBACK
    """Name or address of rank 0's host, as the others reach it."""
    port: int = 0
    """There; 0 for any, when there are no others."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Token that the hosts know each other by, and certificates if it is to be encrypted."""
    known_as: str | None = None
    """Name or address under which other pods reach this host, where it is not rank 0's."""

    def ranks_of(self, node: int, size: int) -> range:
        """The ranks of a host, of `size` in all. Raises ValueError when they cannot be even."""
        if size % self.nodes:
            raise ValueError(
                f"tensor_parallel_size={size} cannot be split evenly over {self.nodes} hosts: "
                "give another --tensor-parallel-size or --nnodes"
            )
        each = size // self.nodes
        return range(node * each, (node + 1) * each)
