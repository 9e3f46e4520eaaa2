"""gRPC between processes of one cluster: servers and channels that carry its token, maybe TLS.

Each call has the token as `authorization: Bearer ...` metadata. A server that knows a token answers
no call without it. Unix sockets are never encrypted: who may open the file may call.
"""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc

from quire.config.address import UNIX
from quire.config.cluster import ClusterConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Options = Sequence[tuple[str, Any]]

Request = TypeVar("Request")
Response = TypeVar("Response")

HEADER = "authorization"
PLAIN = ClusterConfig()
"""No token and no certificates: for one machine."""


class Cluster:
    """Makes servers and channels. Raises OSError when a certificate cannot be read."""

    def __init__(self, config: ClusterConfig = PLAIN) -> None:
        self._token = config.cluster_token
        self._server_credentials: grpc.ServerCredentials | None = None
        self._channel_credentials: grpc.ChannelCredentials | None = None
        if config.cluster_tls_cert is not None:
            key, certificate, authority = _read(config)
            self._server_credentials = grpc.ssl_server_credentials(
                [(key, certificate)], authority, require_client_auth=True
            )
            self._channel_credentials = grpc.ssl_channel_credentials(authority, key, certificate)

    def server(self, options: Options = ()) -> grpc.aio.Server:
        """A server that refuses calls without the cluster's token, if there is one."""
        guards = [] if self._token is None else [_Guard(self._token)]
        return grpc.aio.server(interceptors=guards, options=[("grpc.so_reuseport", 0), *options])

    def bind(self, server: grpc.aio.Server, address: str) -> int:
        """Have the server listen; returns its port. Raises OSError when it cannot."""
        try:
            if self._server_credentials is None or address.startswith(UNIX):
                return server.add_insecure_port(address)
            return server.add_secure_port(address, self._server_credentials)
        except RuntimeError:
            raise OSError(f"cannot listen on {address}: it is in use, or not of here") from None

    def channel(self, address: str, options: Options = ()) -> grpc.aio.Channel:
        """A channel whose calls carry the cluster's token."""
        channel = (
            grpc.aio.insecure_channel(address, options=options)
            if self._channel_credentials is None or address.startswith(UNIX)
            else grpc.aio.secure_channel(address, self._channel_credentials, options=options)
        )
        if self._token is None:
            return channel
        return cast("grpc.aio.Channel", _TokenChannel(channel, self._token))


def bearer_is(token: str, header: str | bytes) -> bool:
    """Whether an authorization header carries the token. In constant time."""
    given = header.encode() if isinstance(header, str) else header
    return secrets.compare_digest(given, f"Bearer {token}".encode())


def _read(config: ClusterConfig) -> tuple[bytes, bytes, bytes]:
    names = (config.cluster_tls_key, config.cluster_tls_cert, config.cluster_tls_ca)
    key, certificate, authority = (Path(name or "").read_bytes() for name in names)
    return key, certificate, authority


class _Guard(grpc.aio.ServerInterceptor):
    """Refuses calls without the token, of whatever service."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails],
            Awaitable[grpc.RpcMethodHandler[Request, Response] | None],
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Response] | None:
        """The call's own handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        given = [value for key, value in metadata if key == HEADER]
        if handler is None or (len(given) == 1 and bearer_is(self._token, given[0])):
            return handler
        # of the same kind as its own: another would wait for messages before it answered
        refusing = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        return cast("grpc.RpcMethodHandler[Request, Response]", refusing(_refuse))


async def _refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")


_KINDS: dict[tuple[bool, bool], Callable[[Any], grpc.RpcMethodHandler[Any, Any]]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""(request is a stream, response is a stream) -> how a handler is made."""


class _TokenChannel:
    """A channel whose calls carry the token. Not an interceptor: those put a queue and a task
    between a stream and its reader."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = ((HEADER, f"Bearer {token}"),)

    async def __aenter__(self) -> _TokenChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.unary_unary(*args, **kwargs), metadata=self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.unary_stream(*args, **kwargs), metadata=self._metadata)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.stream_unary(*args, **kwargs), metadata=self._metadata)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.stream_stream(*args, **kwargs), metadata=self._metadata)
