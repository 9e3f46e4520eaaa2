"""`python -m quire.engine.parallel.rank`: a rank beyond the first of a tensor-parallel engine.

The first line of stdin is a JSON object: {"engine": {...EngineConfig}, "rank": 1, "world_size": 2,
"local_rank": 1, "local_size": 2, "master": "host:port", "token": "...", "log_level": "warning"}.
`master` is where rank 0 listens; `local_*` count the ranks on this host.

Its life: connect, load this rank's part of the model, then one step after another as rank 0 says,
until the connection ends. Exit code 0 then, 1 after a failure, which rank 0 has been told.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Never

from quire.config.base import from_mapping
from quire.config.engine import EngineConfig
from quire.engine.parallel.channel import BEAT_S, Channel, Kind
from quire.telemetry.logging import configure

if TYPE_CHECKING:
    from quire.engine.runner.runner import ModelRunner

logger = logging.getLogger(__name__)

CONNECT_S = 30.0


@dataclass(frozen=True)
class RankOptions:
    """Which rank this is, and where rank 0 is."""

    engine: EngineConfig
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master: str
    token: str
    log_level: str = "warning"

    @classmethod
    def read(cls, line: str) -> RankOptions:
        """From a line of JSON. Raises ValueError, TypeError or KeyError."""
        raw: dict[str, Any] = json.loads(line)
        return cls(**raw | {"engine": from_mapping(EngineConfig, raw["engine"])})

    @property
    def host(self) -> str:
        """Of rank 0."""
        return self.master.rpartition(":")[0]


def main() -> int:
    """Read the options and follow rank 0; returns the exit code."""
    try:
        options = RankOptions.read(sys.stdin.readline())
    except (ValueError, TypeError, KeyError) as error:
        print(f"quire: error: bad rank options: {error}", file=sys.stderr)
        return 2
    configure(options.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, whose end is this one's
    try:
        channel, address = _connect(options)
    except OSError as error:
        logger.error("rank %d cannot reach rank 0: %s", options.rank, error)
        return 1
    threading.Thread(target=_show_life, args=(channel,), name="beat", daemon=True).start()
    try:
        follow(_load(options, channel, address), channel)
    except EOFError:
        return 0  # the only way out of `follow` that is no failure
    except (ValueError, OSError) as error:
        _tell(channel, str(error), is_refusal=True)
        return 1
    except BaseException as error:
        if _is_over(channel):
            return 0  # the others have been ended too, in the middle of an exchange
        logger.exception("rank %d failed", options.rank)
        _tell(channel, f"{type(error).__name__}: {error}", is_refusal=False)
        return 1


def follow(runner: ModelRunner, channel: Channel) -> Never:
    """Execute the steps that rank 0 sends, until the stream ends with EOFError."""
    from quire.engine.parallel.plan_bytes import unpack

    steps: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    args = (runner, channel, steps)
    threading.Thread(target=_receive, args=args, name="orders", daemon=True).start()
    while True:
        payload = steps.get()
        if isinstance(payload, Exception):
            raise payload
        inputs, copies = unpack(payload)
        if len(copies):
            runner.backend.copy_blocks(copies)
        runner.backend.compute(inputs)


def _receive(
    runner: ModelRunner, channel: Channel, steps: queue.SimpleQueue[bytes | Exception]
) -> None:
    """Take in what rank 0 says, also while a step runs; ends with what it puts last."""
    from quire.engine.parallel.kv import RankEndpoint

    endpoint = RankEndpoint(runner.backend, lambda answer: channel.send(Kind.KV, answer))
    try:
        while True:
            kind, payload = channel.receive()
            if kind is Kind.STEP:
                steps.put(payload)
            elif kind is Kind.KV:
                endpoint.obey(payload)
            else:
                raise RuntimeError(f"rank 0 sent {kind.name}")
    except (EOFError, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        steps.put(error)


def _connect(options: RankOptions) -> tuple[Channel, str]:
    """The connection to rank 0, and this host's address on it."""
    host, _, port = options.master.rpartition(":")
    sock = socket.create_connection((host, int(port)), CONNECT_S)
    sock.settimeout(None)
    channel = Channel(sock)
    channel.send_json(Kind.HELLO, {"token": options.token, "rank": options.rank})
    return channel, sock.getsockname()[0]


def _is_over(channel: Channel, within_s: float = 0.0) -> bool:
    """Rank 0 has closed the connection, or does so in time."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLRDHUP)
    return bool(poll.poll(within_s * 1000))


def _show_life(channel: Channel) -> None:
    """Tell rank 0 that this process runs; end it when rank 0 is gone, whatever it is doing."""
    while not _is_over(channel, BEAT_S):
        try:
            channel.send(Kind.BEAT)
        except OSError:
            break
    os._exit(0)


def _load(options: RankOptions, channel: Channel, address: str) -> ModelRunner:
    # imported here: connected, this process is known to rank 0 while torch takes its seconds
    from quire.engine.parallel.group import TorchGroup, reach_store
    from quire.engine.runner.load import Place, find_model, load_rank

    rank, size = options.rank, options.world_size
    port = channel.receive_json(Kind.WELCOME)["store_port"]
    group = TorchGroup(reach_store(options.host, port, size), rank, size, address)
    model = find_model(options.engine)
    place = Place(group, options.local_rank, options.local_size)
    return load_rank(model, place, lambda _: None).runner


def _tell(channel: Channel, message: str, *, is_refusal: bool) -> None:
    with contextlib.suppress(OSError):
        channel.send_json(Kind.FAILED, {"message": message[:2000], "is_refusal": is_refusal})


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # threads of torch would keep the interpreter from ending
    os._exit(code)
