"""How this process joins a Ray cluster, and what to change when it cannot."""

from __future__ import annotations

import os
import socket

from quire.config.address import split_address

OBJECT_STORE_BYTES = 80_000_000
"""Ray's least is 75 MB; nothing is kept there."""
NICENESS = ("RAY_worker_niceness", "0")
"""Variable of a raylet. Its processes, and the engines that they start, would have a niceness of 15
and yield to whatever else runs on the host, the gateway among it."""
NODE_NAME = "QUIRE_NODE_NAME"
"""Variable of a raylet: the name under which others reach its host, where that is not its address,
because certificates are made for names."""


class RayError(Exception):
    """Ray cannot be used; the message says what to change."""


def prepare_environment() -> None:
    """Before gRPC is imported: it need not know that Ray forks while other threads make calls."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def own_address(head: str) -> str:
    """Of this host, as seen on the way to the head. Raises RayError."""
    host, port = split_address(head)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RayError(f"there is no way to Ray's head at {head}: {error.strerror}") from None


def why_not_connected(address: str, error: BaseException) -> str:
    """What to change, from what Ray says."""
    import ray

    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return (
            f"Ray at {address} is of another version than here (ray {ray.__version__}): "
            f"install the same ray and Python on every node. Ray says: {text}"
        )
    if isinstance(error, ConnectionError) and address == "auto":
        return "no Ray runs on this host: start one with `ray start`, or use ray: local"
    if "No node info found" in text:
        return (
            f"this host is no node of the Ray cluster at {address}: run "
            f"`ray start --address={address} --num-cpus=0` on it first"
        )
    return f"no Ray cluster can be reached at {address}: {text}"
