"""`quire control ADDRESS COMMAND`: tell one running worker what to do, or ask how it is."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.config.address import check_address
from quire.config.base import check_fields
from quire.config.cluster import ClusterConfig
from quire.config.flags import Command, UsageError, parse
from quire.config.option import option
from quire.config.values import did_you_mean
from quire.config.worker import ROLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.proto import worker_pb2

FAILED = 1
ANSWER_S = 15.0
"""For an answer, beside the time that the command itself may take."""
COMMANDS = ("health", "drain", "role", "sleep", "wake", "reset-cache")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How long a command may take."""

    timeout: float = option(30.0, "control")
    """Seconds: for drain and sleep, how long to wait for the worker's requests to go or finish."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.timeout < 0:
            raise ValueError(f"timeout must not be negative, not {self.timeout}")


COMMAND = Command(
    prog="quire control",
    summary="Command one running worker: quire control ADDRESS COMMAND.",
    owners=(ControlConfig, ClusterConfig),
    reads_environment=True,
    epilog=(
        "COMMAND is health (how it is, as JSON), drain (no new requests, then end), role "
        "prefill|decode|both, sleep (drop the KV cache until it wakes), wake, or reset-cache "
        "(forget cached prefixes). ADDRESS is its gRPC address, host:port or unix:/path."
    ),
)


def run(argv: Sequence[str]) -> int:
    """Send the command; returns 0, or 1 when the worker cannot be reached or refuses."""
    first = next((i for i, arg in enumerate(argv) if arg.startswith("-")), len(argv))
    resolved = parse(COMMAND, argv[first:], os.environ)
    address, command, argument = _words(argv[:first])
    request = _request(command, argument, resolved.get(ControlConfig).timeout)
    cluster = resolved.get(ClusterConfig)
    timeout_s = ANSWER_S + resolved.get(ControlConfig).timeout
    return asyncio.run(_ask(address, request, cluster, timeout_s))


def _words(words: Sequence[str]) -> tuple[str, str, str]:
    """Address, command, role. Raises UsageError."""
    if len(words) < 2:
        raise UsageError(COMMAND.prog, "an address and a command are needed; see --help")
    address, command, *rest = words
    try:
        check_address(address)
    except ValueError as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise UsageError(COMMAND.prog, f"unknown command {command!r}{hint}; see --help")
    if command == "role" and (len(rest) != 1 or rest[0] not in ROLES):
        raise UsageError(COMMAND.prog, f"a role is one of {', '.join(ROLES)}")
    if command != "role" and rest:
        raise UsageError(COMMAND.prog, f"{command} takes no argument, but {rest[0]!r} is given")
    return address, command, "".join(rest)


def _request(command: str, role: str, timeout_s: float) -> worker_pb2.ControlRequest:
    from quire.proto import worker_pb2
    from quire.worker.standing import Role

    timeout_ms = round(timeout_s * 1000)
    if command == "role":
        weights = Role(role).weights
        message: Any = worker_pb2.SetRole(
            prefill_weight=weights.prefill, decode_weight=weights.decode
        )
        return worker_pb2.ControlRequest(set_role=message)
    if command == "drain":
        return worker_pb2.ControlRequest(drain=worker_pb2.Drain(timeout_ms=timeout_ms))
    if command == "sleep":
        return worker_pb2.ControlRequest(sleep=worker_pb2.Sleep(level=1, timeout_ms=timeout_ms))
    if command == "wake":
        return worker_pb2.ControlRequest(wake=worker_pb2.Wake())
    if command == "reset-cache":
        reset = worker_pb2.ResetPrefixCache()
        return worker_pb2.ControlRequest(reset_prefix_cache=reset)
    return worker_pb2.ControlRequest(health=worker_pb2.Health())


async def _ask(
    address: str, request: worker_pb2.ControlRequest, config: ClusterConfig, timeout_s: float
) -> int:
    import grpc
    from google.protobuf.json_format import MessageToJson

    from quire.cluster.rpc import Cluster
    from quire.proto.worker_pb2_grpc import WorkerStub

    try:
        async with Cluster(config).channel(address) as channel:
            reply = await WorkerStub(channel).Control(request, timeout=timeout_s)
    except (grpc.aio.AioRpcError, OSError) as error:
        why = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
        print(f"{COMMAND.prog}: error: {address}: {why}", file=sys.stderr)
        return FAILED
    if reply.HasField("health"):
        print(
            MessageToJson(
                reply.health, preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
        )  # fmt: skip
        return 0 if reply.ok else FAILED
    if not reply.ok:
        print(f"{COMMAND.prog}: error: {reply.message}", file=sys.stderr)
        return FAILED
    freed = f", {reply.freed_bytes / 1e6:.0f} MB given back" if reply.freed_bytes else ""
    print(f"{reply.message}{freed}")
    return 0
