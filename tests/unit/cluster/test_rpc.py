"""Calls between processes carry the cluster's token; without it nothing is answered."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from certificates import certificate_files

from quire.cluster.rpc import Cluster
from quire.config.cluster import ClusterConfig

KINDS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}
LIMIT_S = 10


async def one(request, context):
    return b"ok"


async def many(request, context):
    yield b"ok"


@contextlib.asynccontextmanager
async def serving(cluster: Cluster, address: str = "127.0.0.1:0"):
    """A server with a method of each kind; gives the address to dial."""
    methods = {
        name: make(many if name.endswith("_stream") else one) for name, make in KINDS.items()
    }
    server = cluster.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.S", methods)])
    port = cluster.bind(server, address)
    await server.start()
    try:
        yield address.replace(":0", f":{port}")
    finally:
        await server.stop(None)


async def call(channel, kind: str) -> bytes:
    method = getattr(channel, kind)(f"/test.S/{kind}")
    argument = iter([b"x"]) if kind.startswith("stream") else b"x"
    answer = method(argument, timeout=LIMIT_S)
    if kind.endswith("_unary"):
        return await answer
    return b"".join([part async for part in answer])


def with_token(token: str | None) -> Cluster:
    return Cluster(ClusterConfig(cluster_token=token))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix"])
async def test_the_right_token_is_answered_and_no_other(kind, address, tmp_path):
    address = f"unix:{tmp_path}/s" if address == "unix" else address
    async with serving(with_token("right"), address) as at:
        async with with_token("right").channel(at) as channel:
            assert await call(channel, kind) == b"ok"
        for wrong in (None, "wrong", "rightt", "righ"):
            async with with_token(wrong).channel(at) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call(channel, kind)
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_refused_stream_need_not_say_anything_first():
    async with serving(with_token("right")) as at, with_token(None).channel(at) as channel:
        silent = channel.stream_stream("/test.S/stream_stream")()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await silent.read()
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_two_headers_are_none():
    async with serving(with_token("right")) as at, with_token(None).channel(at) as channel:
        twice = (("authorization", "Bearer right"), ("authorization", "Bearer right"))
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/test.S/unary_unary")(b"", metadata=twice)


async def test_without_a_token_anyone_on_the_machine_may_call():
    async with serving(Cluster()) as at, with_token("whatever").channel(at) as channel:
        assert await call(channel, "unary_unary") == b"ok"


async def test_mutual_tls_refuses_strangers_and_plain_text(tmp_path):
    ours, strangers = (
        ClusterConfig(**certificate_files(tmp_path, name)) for name in ("ours", "strangers")
    )
    async with serving(Cluster(ours)) as at:
        async with Cluster(ours).channel(at) as channel:
            assert await call(channel, "stream_stream") == b"ok"
        for other in (strangers, ClusterConfig()):
            async with Cluster(other).channel(at) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call(channel, "unary_unary")
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_cannot_be_used_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        Cluster(ClusterConfig(cluster_tls_cert="/no", cluster_tls_key="/no", cluster_tls_ca="/no"))
    cluster = Cluster()
    async with serving(cluster) as at:
        with pytest.raises(OSError, match="cannot listen"):
            cluster.bind(cluster.server(), at)
