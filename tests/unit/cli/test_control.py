"""`quire control` against a servicer that notes what it is asked."""

from __future__ import annotations

import asyncio
import json
import threading

import grpc
import pytest

from quire.cli.main import main
from quire.proto import worker_pb2, worker_pb2_grpc


class Noting(worker_pb2_grpc.WorkerServicer):
    def __init__(self) -> None:
        self.asked: list[worker_pb2.ControlRequest] = []
        self.reply = worker_pb2.ControlReply(ok=True, message="done")

    async def Control(self, request, context):
        self.asked.append(request)
        return self.reply


@pytest.fixture
def worker(tmp_path):
    noting, stop = Noting(), threading.Event()
    noting.address = f"unix:{tmp_path}/w.sock"
    ready = threading.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(noting, server)
        server.add_insecure_port(noting.address)
        await server.start()
        ready.set()
        await asyncio.to_thread(stop.wait)
        await server.stop(None)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield noting
    stop.set()
    thread.join(30)


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["drain", "--timeout", "2.5"], {"drain": {"timeout_ms": 2500}}),
        (["role", "prefill"], {"set_role": {"prefill_weight": 1.0, "decode_weight": 0.0}}),
        (["role", "both"], {"set_role": {"prefill_weight": 1.0, "decode_weight": 1.0}}),
        (["sleep"], {"sleep": {"level": 1, "timeout_ms": 30000}}),
        (["wake"], {"wake": {}}),
        (["reset-cache"], {"reset_prefix_cache": {}}),
    ],
)
def test_commands_reach_the_worker(worker, capsys, words, want) -> None:
    assert main(["control", worker.address, *words]) == 0
    assert worker.asked == [worker_pb2.ControlRequest(**want)]
    assert capsys.readouterr().out == "done\n"


def test_health_is_json_and_its_exit_code_says_whether_it_lives(worker, capsys) -> None:
    worker.reply = worker_pb2.ControlReply(ok=True, health={"live": True, "running": 3})
    assert main(["control", worker.address, "health"]) == 0
    health = json.loads(capsys.readouterr().out)
    assert (health["live"], health["ready"], health["running"]) == (True, False, 3)
    worker.reply.ok = False
    assert main(["control", worker.address, "health"]) == 1


def test_what_was_given_back_is_said_and_a_refusal_is_an_error(worker, capsys) -> None:
    worker.reply = worker_pb2.ControlReply(ok=True, message="asleep", freed_bytes=48_000_000)
    assert main(["control", worker.address, "sleep"]) == 0
    assert capsys.readouterr().out == "asleep, 48 MB given back\n"
    worker.reply = worker_pb2.ControlReply(ok=False, message="the worker is draining")
    assert main(["control", worker.address, "sleep"]) == 1
    assert capsys.readouterr().err == "quire control: error: the worker is draining\n"


def test_nobody_there(tmp_path, capsys) -> None:
    assert main(["control", f"unix:{tmp_path}/none.sock", "health"]) == 1
    assert "none.sock" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "an address and a command"),
        (["localhost:1", "drian"], "drain"),
        (["nonsense", "drain"], "nonsense"),
        (["localhost:1", "role", "king"], "prefill, decode, both"),
        (["localhost:1", "wake", "up"], "takes no argument"),
    ],
)
def test_mistakes(words, says, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["control", *words])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
