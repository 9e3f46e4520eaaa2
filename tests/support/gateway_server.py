"""A gateway on a real port, in a thread of its own, over a fake worker."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fake_servicer
import uvicorn
import uvloop

from quire.config.gateway import GatewayConfig, TokenizerConfig
from quire.gateway.app import Upstream, clients_of, create_app
from quire.gateway.fake_worker import FakeWorker
from quire.gateway.http_protocol import BoundedHttpProtocol
from quire.proto import worker_pb2
from quire.telemetry.instruments import new_registry
from quire.telemetry.metrics import gateway_instruments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from quire.gateway.fake_worker import Script
    from quire.text.tokenizer import Tokenizer

TIMEOUT_S = 30.0
MODEL = "tiny"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The JSON of every data line, without [DONE]."""
        lines = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


@dataclass
class Gateway:
    """What a test needs of a running gateway."""

    port: int
    worker: Any
    """FakeWorker or FakeServicer."""
    loop: asyncio.AbstractEventLoop
    tokenizer: Tokenizer
    worker_address: str | None = None
    grpc_server: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, coroutine: Any) -> Any:
        """Run something on the gateway's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT_S)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        all_headers = {"content-type": "application/json"} if body is not None else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, body, all_headers | (headers or {}))
            response = connection.getresponse()
            text = response.read().decode()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, text)
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.request("POST", path, body, headers)

    def chat(self, **fields: Any) -> Answer:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, **fields: Any) -> Answer:
        return self.post("/v1/completions", {"model": MODEL, "prompt": "hi", **fields})

    def raw(self, data: bytes) -> bytes:
        """Send bytes; everything that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S) as sock:
            sock.sendall(data)
            received = b""
            while chunk := sock.recv(65536):
                received += chunk
            return received

    def until(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
        """Wait for a condition to become true; fails the test if it does not."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, "condition did not become true"
            time.sleep(0.01)
        return value


@contextmanager
def gateway(
    tokenizer: Tokenizer,
    script: Script,
    *,
    model: dict[str, Any] | None = None,
    grpc_socket: Path | None = None,
    wait: bool = True,
    **config: Any,
) -> Iterator[Gateway]:
    """A running gateway; with `grpc_socket`, over the real wire to a fake servicer."""
    info = worker_pb2.ModelInfo(
        model=str(tokenizer.folder), max_model_len=2048, vocab_size=tokenizer.vocab_size
    )
    for key, value in (model or {}).items():
        setattr(info, key, value)
    started: dict[str, Any] = {}
    ready = threading.Event()
    runner = threading.Thread(
        target=lambda: uvloop.run(
            _serve(tokenizer, script, info, grpc_socket, wait, config, started, ready)
        ),
        daemon=True,
    )
    runner.start()
    assert ready.wait(TIMEOUT_S)
    server: uvicorn.Server = started["server"]
    made: Gateway = started["gateway"]
    try:
        if wait:
            made.until(lambda: made.get("/readyz").status == 200)
        yield made
    finally:
        server.should_exit = True
        runner.join(TIMEOUT_S)
        assert not runner.is_alive(), "the gateway did not stop"


async def _serve(tokenizer, script, info, grpc_socket, wait, config, started, ready) -> None:
    config = {"served_model_name": (MODEL,), "shutdown_timeout": 1.0, **config}
    registry = new_registry("gateway")
    address = grpc_server = None
    if grpc_socket is not None:
        address = f"unix:{grpc_socket}"
        worker = fake_servicer.FakeServicer(info if wait else None, script)
        grpc_server = await fake_servicer.start(worker, address)
    else:
        worker = FakeWorker(info, script)
    options = GatewayConfig(**config)
    app = create_app(
        options,
        TokenizerConfig(tokenizer=str(tokenizer.folder)),
        Upstream(clients_of({"0": address}, options) if address else [worker]),
        gateway_instruments(registry),
        registry,
    )
    sock = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http=BoundedHttpProtocol,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=1,
            root_path=config.get("root_path", ""),
        )
    )
    server.capture_signals = _no_signals
    started["server"] = server
    started["gateway"] = Gateway(
        port=sock.getsockname()[1],
        worker=worker,
        loop=asyncio.get_running_loop(),
        tokenizer=tokenizer,
        worker_address=address,
        grpc_server=grpc_server,
    )
    ready.set()
    await server.serve(sockets=[sock])
    if grpc_server is not None:
        await started["gateway"].grpc_server.stop(None)


@contextmanager
def _no_signals() -> Iterator[None]:
    yield
