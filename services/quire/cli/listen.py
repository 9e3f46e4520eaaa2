"""The server's listening socket, opened before anything slow happens."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.config.gateway import GatewayConfig

BACKLOG = 2048


class ListenError(Exception):
    """The address cannot be used; the message says which and why."""


def listen(config: GatewayConfig) -> tuple[socket.socket, GatewayConfig]:
    """The listening socket, and the config with the port that was bound.

    Clients may connect at once; they are answered when the server runs. Raises ListenError.
    """
    if config.uds is not None:
        return _listen_unix(Path(config.uds)), config
    host = config.host.strip("[]")
    try:
        family, *_, address = socket.getaddrinfo(
            host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.create_server(
            address[:2], family=family, backlog=BACKLOG
        )  # fmt: skip
    except OSError as error:
        hint = "; choose another with --port" if error.errno == errno.EADDRINUSE else ""
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror  # negative: a host name's
        raise ListenError(f"cannot listen on {host}:{config.port}: {reason}{hint}") from None
    return sock, replace(config, port=sock.getsockname()[1])


@contextmanager
def closing(config: GatewayConfig, sock: socket.socket) -> Iterator[None]:
    """Closes the socket at the end, and removes it where it is a file."""
    try:
        yield
    finally:
        sock.close()
        if config.uds is not None:
            Path(config.uds).unlink(missing_ok=True)


def _listen_unix(path: Path) -> socket.socket:
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()  # left behind by a server that was killed
        return socket.create_server(str(path), family=socket.AF_UNIX, backlog=BACKLOG)
    except OSError as error:
        raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from None


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0
