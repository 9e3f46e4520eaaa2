"""`python -m quire.engine.parallel.rank`: a rank beyond the first of a tensor-parallel engine.

The first line of stdin is a `RankOptions` as JSON; stdin stays open for as long as whoever started
this process lives.

Its life: connect, load this rank's part of the model, then one step after another as rank 0 says,
until the connection ends. Exit code 0 then, 1 after a failure, which rank 0 has been told.

On another host than rank 0's, `node` has started this process and ends with the gang. One that
hangs does not, and whoever supervises it would see a process that runs: its ranks end it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Never

from quire.cluster.tls import tls_context
from quire.config.exit_codes import CANNOT_SERVE, exit_code
from quire.engine.parallel import greeting
from quire.engine.parallel.channel import BEAT_S, Channel, Kind
from quire.engine.parallel.processes import RankOptions
from quire.engine.parallel.vitals import Vitals, resident_bytes
from quire.telemetry.logging import configure

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.engine.runner.runner import ModelRunner

logger = logging.getLogger(__name__)

CONNECT_S = 30.0
STARTER_S = 3.0
"""For `node` to end, and with it this process, once the gang has."""


def main() -> Never:
    """Read the options and follow rank 0 to the end."""
    starter = os.getppid()
    try:
        options = RankOptions.read(sys.stdin.readline())
    except (ValueError, TypeError, KeyError) as error:
        print(f"quire: error: bad rank options: {error}", file=sys.stderr)
        sys.exit(2)
    configure(options.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, whose end is this one's
    try:
        channel = _connect(options)
    except (OSError, EOFError, ValueError, greeting.Refused) as error:
        logger.error("rank %d cannot reach rank 0: %s", options.rank, error)
        sys.exit(1)
    leave = partial(_leave, starter if options.node else None)
    vitals = Vitals()
    beat = partial(_show_life, channel, vitals, leave)
    threading.Thread(target=beat, name="beat", daemon=True).start()
    leave(_run(options, channel, vitals))


def _run(options: RankOptions, channel: Channel, vitals: Vitals) -> int:
    """Until the gang's end, or a failure; returns the exit code."""
    try:
        runner = _load(options, channel)
        vitals.device_bytes = runner.backend.device_bytes()
        follow(_orders(runner, channel, options), runner, vitals)
    except EOFError:
        return 0  # the only way out of `follow` that is no failure
    except (ValueError, OSError) as error:
        _tell(channel, str(error), is_refusal=exit_code(error) == CANNOT_SERVE)
        return 1
    except BaseException as error:
        if channel.is_over():
            return 0  # the others have been ended too, in the middle of an exchange
        logger.exception("rank %d failed", options.rank)
        _tell(channel, f"{type(error).__name__}: {error}", is_refusal=False)
        return 1


def follow(
    steps: queue.SimpleQueue[bytes | Exception], runner: ModelRunner, vitals: Vitals
) -> Never:
    """Execute the steps that rank 0 sends, until the stream ends with EOFError."""
    from quire.engine.parallel.plan_bytes import unpack

    while True:
        payload = steps.get()
        if isinstance(payload, Exception):
            raise payload
        inputs, copies = unpack(payload)
        if len(copies):
            runner.backend.copy_blocks(copies)
        runner.backend.compute(inputs)
        vitals.steps += 1


def _orders(
    runner: ModelRunner, channel: Channel, options: RankOptions
) -> queue.SimpleQueue[bytes | Exception]:
    """The steps that rank 0 sends, taken in by a thread that sees to everything else."""
    steps: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    args = (runner, channel, options, steps)
    threading.Thread(target=_receive, args=args, name="orders", daemon=True).start()
    return steps


def _receive(
    runner: ModelRunner,
    channel: Channel,
    options: RankOptions,
    steps: queue.SimpleQueue[bytes | Exception],
) -> None:
    """Take in what rank 0 says, also while a step runs; ends with what it puts last."""
    from quire.engine.parallel.duties import Duties, OwnHost

    own = OwnHost(channel.host, options.known_as or channel.host) if options.node else None
    duties = Duties(runner.backend, lambda answer: channel.send(Kind.CALL, answer), own)
    try:
        while True:
            kind, payload = channel.receive()
            if kind is Kind.STEP:
                steps.put(payload)
            elif kind is Kind.CALL:
                duties.obey(payload)
            else:
                raise RuntimeError(f"rank 0 sent {kind.name}")
    except (EOFError, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        steps.put(error)


def _connect(options: RankOptions) -> Channel:
    """The connection to rank 0. Raises OSError, EOFError, ValueError, Refused."""
    sock = socket.create_connection(options.master, CONNECT_S)
    tls = tls_context(options.cluster, server=False)
    channel = Channel.over(sock, tls, is_dialler=True)
    greeting.introduce(channel, options.secret, rank=options.rank, pid=os.getpid())
    return channel


def _show_life(channel: Channel, vitals: Vitals, leave: Callable[[int], Never]) -> None:
    """Tell rank 0 that this process runs; end it when rank 0, or who started this, is gone,
    whatever it is doing."""
    starter = select.poll()
    starter.register(sys.stdin.fileno(), select.POLLHUP)
    while not channel.is_over(BEAT_S) and not starter.poll(0):
        try:
            vitals.host_bytes = resident_bytes()
            channel.send(Kind.BEAT, vitals.pack())
        except OSError:
            break
    leave(0)


def _leave(starter: int | None, code: int) -> Never:
    """End this process; before it `starter`, where one is named that should have ended."""
    sys.stderr.flush()
    if starter is not None:
        lives = select.poll()
        lives.register(sys.stdin.fileno(), select.POLLHUP)
        if not lives.poll(STARTER_S * 1000) and os.getppid() == starter:
            os.kill(starter, signal.SIGKILL)
    # threads of torch would keep the interpreter from ending
    os._exit(code)


def _load(options: RankOptions, channel: Channel) -> ModelRunner:
    # imported here: connected, this process is known to rank 0 while torch takes its seconds
    from quire.engine.parallel.group import TorchGroup, reach_store
    from quire.engine.runner.load import Place, find_model, load_rank

    rank, size = options.rank, options.world_size
    port = channel.receive_json(Kind.WELCOME)["store_port"]
    group = TorchGroup(reach_store(options.master[0], port, size), rank, size, channel.host)
    model = find_model(options.engine)
    if options.fingerprint not in (None, model.fingerprint().hex()):
        raise ValueError(
            f"{model.folder} on host {channel.host} is not what rank 0 has under this name: copy "
            "the same files to every host"
        )
    place = Place(group, options.local_rank, options.local_size)
    return load_rank(model, place, lambda _: None).runner


def _tell(channel: Channel, message: str, *, is_refusal: bool) -> None:
    with contextlib.suppress(OSError):
        channel.send_json(Kind.FAILED, {"message": message[:2000], "is_refusal": is_refusal})


if __name__ == "__main__":
    main()
