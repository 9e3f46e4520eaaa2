"""Workers that `quire doctor` and `quire top` look at, by their gRPC addresses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.config.address import named_address
from quire.config.base import check_fields
from quire.config.option import option

if TYPE_CHECKING:
    from quire.cluster.rpc import Cluster
    from quire.proto import worker_pb2

TIMEOUT_S = 5.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_retries", 0),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Whom to ask."""

    address: tuple[str, ...] = option((), "workers")
    """gRPC address of a worker, host:port or unix:/path; several are allowed, NAME=ADDRESS too."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.named) < len(self.address):
            raise ValueError("address: one is given twice")

    @property
    def named(self) -> dict[str, str]:
        """Name -> address."""
        return dict(named_address(text) for text in self.address)


@dataclass(frozen=True)
class Seen:
    """What a worker said of itself."""

    name: str
    """As it was given on the command line."""
    address: str
    model: worker_pb2.ModelInfo
    load: worker_pb2.Load

    @property
    def worker(self) -> str:
        """Its stable name."""
        return self.model.kv.worker or self.name

    @property
    def role(self) -> str:
        """In a word."""
        return role_of(self.load)


def role_of(load: worker_pb2.Load) -> str:
    """What a worker's weights mean."""
    prefill = load.prefill_weight if load.HasField("prefill_weight") else 1.0
    decode = load.decode_weight if load.HasField("decode_weight") else 1.0
    if prefill == decode:
        return "both"
    if 0 in (prefill, decode):
        return "decode" if prefill == 0 else "prefill"
    return f"{prefill:g}/{decode:g}"


class WorkerError(Exception):
    """A worker did not answer as it should; the message is for the person at the keyboard."""


async def look(cluster: Cluster, name: str, address: str) -> Seen:
    """Ask a worker for its model and load. Raises WorkerError within TIMEOUT_S."""
    import grpc

    from quire.proto import worker_pb2
    from quire.proto.worker_pb2_grpc import WorkerStub

    model, phase = None, ""
    try:
        async with asyncio.timeout(TIMEOUT_S), cluster.channel(address, CHANNEL_OPTIONS) as channel:
            call = WorkerStub(channel).Watch(worker_pb2.WatchRequest())
            try:
                async for update in call:
                    if update.HasField("startup"):
                        phase = update.startup.phase
                    elif update.HasField("model"):
                        model = update.model
                    elif update.HasField("load") and model is not None:
                        return Seen(name, address, model, update.load)
            finally:
                call.cancel()
    except TimeoutError:
        raise WorkerError(f"still starting: {phase}" if phase else "no answer in time") from None
    except grpc.aio.AioRpcError as error:
        raise WorkerError(words(error)) from None
    raise WorkerError("it stopped while it was asked")


def words(error: object) -> str:
    """A failed call in short."""
    details = getattr(error, "details", lambda: None)()
    return " ".join(str(details or type(error).__name__).split())
