"""Probes and metrics of a process over HTTP."""

from __future__ import annotations

import asyncio
import contextlib

import httpx2
import pytest

from quire.cluster.status_server import Status, open_socket, serve_status


@contextlib.asynccontextmanager
async def serving(status: Status):
    sock = open_socket("127.0.0.1:9", 0)
    task = asyncio.create_task(serve_status(status, sock))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with httpx2.AsyncClient(base_url=url) as client:
            yield client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("good", [True, False])
async def test_probes_say_what_the_process_says(good):
    status = Status(lambda: "", lambda: good, lambda: not good)
    async with serving(status) as client:
        assert (await client.get("/healthz")).status_code == (200 if good else 503)
        assert (await client.get("/readyz")).status_code == (503 if good else 200)
        assert (await client.get("/other")).status_code == 404


async def test_metrics_need_the_clusters_token_and_probes_do_not():
    status = Status(lambda: "x 1\n", lambda: True, lambda: True, token="t")
    async with serving(status) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/metrics")).status_code == 401
        wrong = await client.get("/metrics", headers={"authorization": "Bearer no"})
        assert wrong.status_code == 401
        right = await client.get("/metrics", headers={"authorization": "Bearer t"})
        assert (right.status_code, right.text) == (200, "x 1\n")
        assert right.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_a_taken_port_is_an_os_error():
    with open_socket("127.0.0.1:9", 0) as sock, pytest.raises(OSError, match="in use"):
        open_socket("127.0.0.1:9", sock.getsockname()[1])
