"""The transports that a configuration names; their libraries are imported only when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.transfer.tcp import TcpTransport

if TYPE_CHECKING:
    from quire.config.transfer import TransferConfig
    from quire.transfer.base import Node, Transport


def make_transports(config: TransferConfig, node: Node) -> list[Transport]:
    """In order of preference. Raises ImportError when a named one is not installed."""
    return [_make(name, config, node) for name in config.kv_transports]


def _make(name: str, config: TransferConfig, node: Node) -> Transport:
    if name == "grpc":
        from quire.transfer.grpc import GrpcTransport

        return GrpcTransport(config, node)
    if name == "nixl":
        from quire.transfer.nixl import NixlTransport

        return NixlTransport(config, node)
    return TcpTransport(config)
