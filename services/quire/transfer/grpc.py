"""Frames over gRPC: the service KvTransfer, for clusters where gRPC is what gets through.

A link is one Push stream in which each message is the bytes of a frame, without a serializer: an
encoded `bytes` field costs one more copy on each side, and measured half the throughput. gRPC lets
5 to 12 MiB run ahead of the reader, so the window of the link is what bounds a sender.

The end of a stream means nothing here: grpc.aio shows a killed client as an orderly end, and a
stopped one as silence. Success is a confirmed COMMIT, silence is found by the link's heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from quire.proto import transfer_pb2
from quire.transfer.base import Unreachable
from quire.transfer.frames import HEADER_BYTES, MAX_BODY_BYTES, FrameError
from quire.transfer.layout import FRAME_BYTES
from quire.transfer.sockets import join_address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from quire.config.transfer import TransferConfig
    from quire.transfer.base import Channel, Node
    from quire.transfer.intake import Intake

SERVICE = "quire.v1.KvTransfer"
STOP_GRACE_S = 0.2
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY_BYTES + HEADER_BYTES),
    ("grpc.max_send_message_length", MAX_BODY_BYTES + HEADER_BYTES),
    ("grpc.so_reuseport", 0),
    # A link is its own connection: two links to one address must not share its flow control.
    ("grpc.use_local_subchannel_pool", 1),
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""

Stream = Any
"""A call (client) or a servicer context: both have async read() and write()."""


class GrpcChannel:
    """One Push stream, either side of it."""

    frame_bytes = FRAME_BYTES
    frames_at_once = 1

    def __init__(self, stream: Stream, end: Callable[[], object]) -> None:
        _keep_freed_memory()
        self._stream = stream
        self._end = end
        self._is_closed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    def start(self, intake: Intake, closed: Callable[[str], None]) -> None:
        """Deliver to the intake from now on."""
        self._reader = asyncio.get_running_loop().create_task(self._read(intake, closed))

    async def send(self, head: bytes, parts: Sequence[memoryview] = ()) -> None:
        """One frame, copied into one message: a serializer may return nothing but bytes."""
        if self._is_closed.is_set():
            return
        try:
            await self._stream.write(b"".join((head, *parts)) if parts else head)
        except (grpc.RpcError, asyncio.InvalidStateError):
            self.close()

    def close(self) -> None:
        """Cancel the stream. An aio call that is dropped without cancel never ends."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            self._end()

    async def ended(self) -> None:
        """Wait until the channel is closed and read no more."""
        await self._is_closed.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self, intake: Intake, closed: Callable[[str], None]) -> None:
        why = "the peer ended the stream"
        try:
            while not self._is_closed.is_set():
                message = await self._stream.read()
                if message is grpc.aio.EOF:
                    break
                intake.feed(message)
        except FrameError as error:
            why = str(error)
        except grpc.RpcError as error:
            why = _words(error)
        finally:
            self.close()
            closed(why)


class GrpcTransport:
    """The service and its clients, with mutual TLS when the config names certificates."""

    name = "grpc"

    def __init__(self, config: TransferConfig, node: Node) -> None:
        self._config = config
        self._node = node
        self._server: grpc.aio.Server | None = None
        self._accept: Callable[[Channel], None] | None = None
        self._open: set[GrpcChannel] = set()
        self._finishing: set[asyncio.Task[None]] = set()

    async def listen(self, accept: Callable[[Channel], None]) -> str:
        """Serve on the configured host and port. Raises OSError when it is taken."""
        config = self._config
        self._accept = accept
        self._server = server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((_handlers(self),))
        address = join_address(config.kv_host, config.kv_grpc_port)
        try:
            if config.cluster_tls_cert is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, _server_credentials(config))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await server.start()
        return join_address(config.kv_advertised_host or config.kv_host, port)

    async def dial(self, address: str) -> Channel:
        """Open a stream. Raises Unreachable."""
        connection = self._connect(address)
        try:
            await _connected(connection)
            call: Stream = connection.stream_stream(f"/{SERVICE}/Push")()
            await call.wait_for_connection()
        except grpc.RpcError as error:
            await connection.close()
            raise Unreachable(_words(error)) from error
        except (Unreachable, asyncio.CancelledError):
            await connection.close()
            raise
        channel = GrpcChannel(call, call.cancel)
        self._own(channel, connection)
        return channel

    async def handshake(self, address: str, timeout_s: float) -> transfer_pb2.Hello:
        """Ask a process who it is, without a link. Raises Unreachable."""
        node = self._node
        request = node.identity.hello(node.listeners, node.config.kv_transports)
        request.proof = node.identity.prove("asking", request.nonce, request.nonce)
        connection = self._connect(address)
        try:
            ask = connection.unary_unary(
                f"/{SERVICE}/Handshake",
                request_serializer=transfer_pb2.Hello.SerializeToString,
                response_deserializer=transfer_pb2.Hello.FromString,
            )
            reply: transfer_pb2.Hello = await ask(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise Unreachable(_words(error)) from error
        finally:
            await connection.close()
        if not node.identity.accepts(reply.proof, "acceptor", request.nonce, reply.nonce):
            raise Unreachable("the peer does not know the cluster's token")
        return reply

    async def close(self) -> None:
        """Stop serving."""
        for channel in list(self._open):
            channel.close()
        await asyncio.gather(*self._finishing)
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)

    # ---- the service

    async def push(self, _: AsyncIterator[bytes], context: Stream) -> None:
        """A link that another process opened."""
        assert self._accept is not None
        channel = GrpcChannel(context, lambda: None)
        self._open.add(channel)
        try:
            self._accept(channel)
            await channel.ended()
        finally:
            channel.close()
            self._open.discard(channel)

    async def answer(self, request: transfer_pb2.Hello, context: Stream) -> transfer_pb2.Hello:
        """Handshake."""
        node = self._node
        if not node.identity.accepts(request.proof, "asking", request.nonce, request.nonce):
            node.counters.refused_links += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token was not proved")
        reply = node.identity.hello(node.listeners, node.config.kv_transports)
        reply.proof = node.identity.prove("acceptor", request.nonce, reply.nonce)
        return reply

    # ----

    def _connect(self, address: str) -> grpc.aio.Channel:
        if self._config.cluster_tls_cert is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        return grpc.aio.secure_channel(address, _client_credentials(self._config), options=OPTIONS)

    def _own(self, channel: GrpcChannel, connection: grpc.aio.Channel) -> None:
        """Close the connection when its stream has ended."""

        async def finish() -> None:
            await channel.ended()
            await connection.close()
            self._open.discard(channel)
            self._finishing.discard(task)

        self._open.add(channel)
        task = asyncio.get_running_loop().create_task(finish())
        self._finishing.add(task)


async def _connected(connection: grpc.aio.Channel) -> None:
    """Wait for the connection; the first failure counts, where gRPC itself would try for ever."""
    while (state := connection.get_state(try_to_connect=True)) != grpc.ChannelConnectivity.READY:
        if state == grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise Unreachable("no connection: nobody listens, or its certificate is refused")
        await connection.wait_for_state_change(state)


@functools.cache
def _keep_freed_memory() -> None:
    """Let malloc use the memory of one message for the next.

    gRPC allocates each message several times. By default glibc maps memory for every large one, or
    trims the heap when it is freed, and the page faults cost more than the copies: 1.25 CPU seconds
    per GB at the receiver, where it is 0.75 with this.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def _handlers(transport: GrpcTransport) -> grpc.GenericRpcHandler:
    handshake = grpc.unary_unary_rpc_method_handler(
        transport.answer,
        request_deserializer=transfer_pb2.Hello.FromString,
        response_serializer=transfer_pb2.Hello.SerializeToString,
    )
    push: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(
        transport.push
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Handshake": handshake, "Push": push})


def _words(error: BaseException) -> str:
    return getattr(error, "details", lambda: None)() or type(error).__name__


def _files(config: TransferConfig) -> tuple[bytes, bytes, bytes]:
    names = (config.cluster_tls_key, config.cluster_tls_cert, config.cluster_tls_ca)
    key, certificate, authority = (Path(name or "").read_bytes() for name in names)
    return key, certificate, authority


def _server_credentials(config: TransferConfig) -> grpc.ServerCredentials:
    key, certificate, authority = _files(config)
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


def _client_credentials(config: TransferConfig) -> grpc.ChannelCredentials:
    key, certificate, authority = _files(config)
    return grpc.ssl_channel_credentials(authority, key, certificate)
