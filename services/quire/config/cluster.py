"""What the processes of one cluster know each other by."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.base import check_fields
from quire.config.option import option


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Token and certificates, the same on every process of a cluster."""

    cluster_token: str | None = option(None, "cluster", secret=True)
    """Secret that every process of the cluster knows: without it no call is answered and no KV link
    is made. Required beyond loopback; better in QUIRE_CLUSTER_TOKEN than on a command line."""
    cluster_tls_cert: str | None = option(None, "cluster")
    """Certificate (PEM file) of this process. With key and CA: mutual TLS between all processes,
    except over Unix sockets."""
    cluster_tls_key: str | None = option(None, "cluster")
    """Private key (PEM file) of cluster_tls_cert."""
    cluster_tls_ca: str | None = option(None, "cluster")
    """Certificate authority (PEM file) that the other processes' certificates must be signed by."""

    def __post_init__(self) -> None:
        check_fields(self)
        token = self.cluster_token
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            # the line break behind a secret in a file, above all
            raise ValueError("cluster_token must be printable ASCII, without line breaks")
        files = (self.cluster_tls_cert, self.cluster_tls_key, self.cluster_tls_ca)
        if any(files) and not all(files):
            raise ValueError("cluster_tls_cert, cluster_tls_key and cluster_tls_ca go together")
