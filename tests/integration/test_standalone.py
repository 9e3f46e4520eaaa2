"""`quire worker`, `quire router` and `quire gateway` as pods run them: over TCP, under a token."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import openai
import pytest
from waiting import wait_until

from quire.cluster.rpc import Cluster
from quire.config.cluster import ClusterConfig
from quire.proto import router_pb2, worker_pb2
from quire.proto.router_pb2_grpc import RouterStub
from quire.proto.worker_pb2_grpc import WorkerStub

START_S = 90
TOKEN = "the-cluster's-token"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
    return kept | variables


@contextmanager
def process(*command: str, **variables: str):
    """`quire ...`, ended by SIGTERM, which has to be orderly."""
    started = subprocess.Popen(
        [sys.executable, "-m", "quire", *command], env=environment(**variables)
    )
    try:
        yield started
        assert started.poll() is None, f"{command[0]} has ended"
    finally:
        started.terminate()
        code = started.wait(30)
    assert code == 0, f"{command[0]} ended with {code}"


def get(url: str, token: str | None = None) -> tuple[int, str]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


@dataclass
class Pods:
    worker: str
    worker_http: str
    router: str
    router_http: str
    gateway: str


@pytest.fixture(scope="module")
def pods():
    """One of each, started by hand in the wrong order."""
    ports = [free_port() for _ in range(5)]
    made = Pods(
        worker=f"127.0.0.1:{ports[0]}",
        worker_http=f"http://127.0.0.1:{ports[1]}",
        router=f"127.0.0.1:{ports[2]}",
        router_http=f"http://127.0.0.1:{ports[3]}",
        gateway=f"http://127.0.0.1:{ports[4]}",
    )
    secret = {"QUIRE_CLUSTER_TOKEN": TOKEN}
    name = f"w0={made.worker}"
    upstream = ("--worker", name, "--router", made.router)
    with (
        process("gateway", *upstream, "--port", str(ports[4]), **secret),
        process(
            "router", "--listen", made.router, "--pod", name, "--http-port", str(ports[3]), **secret
        ),
        # beyond loopback, as in a pod; dialed here by the loopback address
        process(
            "worker", "demo", "--listen", f"0.0.0.0:{ports[0]}", "--advertise", made.worker,
            "--http-port", str(ports[1]), "--max-model-len", "512", "--num-threads", "1",
            "--kv-cache-memory-bytes", "16M", **secret,
        ),
    ):  # fmt: skip
        wait_until(lambda: get(f"{made.gateway}/readyz")[0] == 200, "the gateway is ready", START_S)
        wait_until(
            lambda: get(f"{made.router_http}/readyz")[0] == 200,
            "the router knows the worker",
            START_S,
        )
        yield made


def test_a_completion_goes_where_the_router_says(pods):
    with openai.OpenAI(base_url=f"{pods.gateway}/v1", api_key="none", max_retries=0) as client:

        def routed() -> bool:
            answers.append(
                client.completions.create(
                    model="demo", prompt="import os\n" * 40, max_tokens=5, temperature=0
                )
            )
            return 'by="router"} 0' not in get(f"{pods.gateway}/metrics")[1]

        answers = []
        # once the gateway knows that it answers
        wait_until(routed, "the router was asked", START_S)
        routed()
    assert answers[-1].usage.prompt_tokens_details.cached_tokens > 0
    page = get(f"{pods.router_http}/metrics", TOKEN)[1]
    assert 'quire_router_pods{state="serving"} 1.0' in page
    [cached] = [x for x in page.splitlines() if x.startswith("quire_router_actual_cached_tokens_t")]
    assert float(cached.split()[-1]) > 0, "the router was told what it had expected"


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_no_call_is_answered_without_the_token(pods, token):
    stranger = Cluster(ClusterConfig(cluster_token=token))
    async with stranger.channel(pods.worker) as worker, stranger.channel(pods.router) as router:
        stub, routing = WorkerStub(worker), RouterStub(router)
        hash_of_nothing = router_pb2.RouteRequest(prompt_len=1)
        control = worker_pb2.ControlRequest(collect_metrics=worker_pb2.CollectMetrics())
        for call in (
            stub.Control(control, timeout=10),
            routing.Route(hash_of_nothing, timeout=10),
            routing.Check(router_pb2.CheckRequest(), timeout=10),
            stub.Watch(worker_pb2.WatchRequest(), timeout=10).read(),
            stub.Session(timeout=10).read(),
            stub.Prefill(worker_pb2.PrefillRequest(), timeout=10).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_probes_and_metrics_of_each_process(pods):
    for url, metric in (
        (pods.worker_http, "quire_requests_running"),
        (pods.router_http, "quire_router_pods"),
    ):
        assert get(f"{url}/healthz")[0] == 200
        assert get(f"{url}/readyz")[0] == 200
        assert get(f"{url}/metrics")[0] == 401
        assert metric in get(f"{url}/metrics", TOKEN)[1]
    assert "quire_requests_running" not in get(f"{pods.gateway}/metrics")[1], "counted twice"


def test_a_gateway_with_another_token_gets_nothing(pods):
    port = free_port()
    flags = ("--worker", pods.worker, "--port", str(port))
    with process("gateway", *flags, QUIRE_CLUSTER_TOKEN="wrong"):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: get(f"{url}/livez")[0] == 200, "it listens", START_S)
        time.sleep(1)
        assert get(f"{url}/readyz")[0] == 503


@pytest.mark.parametrize(
    "command",
    [
        ("worker", "--listen", "0.0.0.0:1"),
        ("worker", "--listen", "[::]:1"),
        ("router", "--listen", "0.0.0.0:1", "--pod", "127.0.0.1:2"),
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_nothing_listens_beyond_this_machine_without_a_token(command):
    done = subprocess.run(
        [sys.executable, "-m", "quire", *command],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cluster_token is needed" in line


def test_a_taken_address_is_one_line_and_code_2(pods):
    done = subprocess.run(
        [sys.executable, "-m", "quire", "router", "--listen", pods.router, "--pod", "a:1"],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on {pods.router}" in done.stderr.splitlines()[-1]
