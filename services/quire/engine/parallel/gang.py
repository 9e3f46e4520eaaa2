"""Rank 0's view of the other ranks: starts them, steps them, notices when one is lost.

    start ──▶ spawned ──all said hello──▶ joined ──all loaded──▶ running
                 │ one dies                  │ one dies or refuses  │ one dies, or is silent
                 ▼                           ▼                      ▼ for SILENCE_S
              ValueError or RankFailed: every rank is ended, nothing of the gang is left

A rank that is lost leaves the others inside an exchange that cannot finish. Ending all of them
closes their connections, which ends rank 0's part of the exchange too: within milliseconds of a
death, within SILENCE_S of a process that hangs, whatever time limit the exchange has.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.config.base import to_mapping
from quire.engine.parallel import plan_bytes
from quire.engine.parallel.channel import SILENCE_S, Channel, Kind
from quire.engine.parallel.group import TorchGroup, serve_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.config.engine import EngineConfig
    from quire.engine.scheduler.plan import StepPlan

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
START_S = 120.0
"""From starting the processes to the last hello."""
LOADING_SILENCE_S = 60.0
"""While a rank loads, a library call may keep its threads from showing life."""
HELLO_S = 5.0
WATCH_S = 0.25
END_S = 2.0
"""For a rank to end by itself once its connection is closed, or to be told of a failure."""


class RankFailed(RuntimeError):
    """A rank of the engine was lost, and with it the engine."""


@dataclass
class _Member:
    """Another rank: its process here, its connection, and when it was last heard."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel | None = None
    heard: float = 0.0

    def end(self, within_s: float) -> None:
        """Wait for the end of the process; make it end after `within_s`."""
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def how_it_died(self) -> str:
        """One clause for the error message."""
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"ended with code {code}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"


@dataclass
class _State:
    """What the watching thread shares with the gang; keeps the gang itself collectable."""

    members: list[_Member]
    failure: Exception | None = None
    failed: threading.Event = field(default_factory=threading.Event)
    ending: bool = False
    silence_s: float = LOADING_SILENCE_S
    on_failure: Callable[[Exception], None] | None = None
    on_kv: Callable[[int, bytes], None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, error: Exception) -> None:
        """The first failure counts: every rank ends now."""
        with self.lock:
            if self.failure is not None or self.ending:
                return
            self.failure, self.ending = error, True
        for member in self.members:
            member.process.kill()
            if member.channel is not None:
                member.channel.close()
        for member in self.members:
            member.end(END_S)
        self.failed.set()
        if self.on_failure is not None:
            self.on_failure(error)

    def close(self) -> None:
        """Every rank ends, and nothing failed."""
        with self.lock:
            was_ending, self.ending = self.ending, True
        if was_ending:
            return
        for member in self.members:
            if member.channel is not None:
                member.channel.close()  # which ends the process
            else:
                member.process.kill()
        for member in self.members:
            member.end(END_S)


class Gang:
    """The ranks beyond the first, as processes on this host. `close` ends them; so does the end of
    this process, however it comes."""

    def __init__(self, members: list[_Member]) -> None:
        self._state = _State(members)
        self._finalizer = weakref.finalize(self, self._state.close)

    @property
    def size(self) -> int:
        """Ranks of the engine, the first one included."""
        return len(self._state.members) + 1

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes of ranks 1, 2 …"""
        return tuple(member.process.pid for member in self._state.members)

    @classmethod
    def start(cls, config: EngineConfig) -> Gang:
        """Start the other ranks of `config` and wait until each has connected.

        Raises RankFailed when one cannot.
        """
        with socket.create_server((HOST, 0)) as listener:
            token = secrets.token_hex(16)
            master = f"{HOST}:{listener.getsockname()[1]}"
            size = config.tensor_parallel_size
            gang = cls([_spawn(config, rank, master, token) for rank in range(1, size)])
            try:
                gang._accept(listener, token)
            except BaseException:
                gang.close()
                raise
        return gang

    def join(self) -> TorchGroup:
        """Make the group of all ranks, which from then on load their parts, and watch over them.

        Raises RankFailed, RuntimeError.
        """
        store, port = serve_store(HOST, self.size)
        for member in self._state.members:
            assert member.channel is not None
            member.heard = time.monotonic()
            member.channel.send_json(Kind.WELCOME, {"store_port": port})
        threading.Thread(target=_watch, args=(self._state,), name="ranks", daemon=True).start()
        return TorchGroup(store, 0, self.size, HOST)

    def loaded(self) -> None:
        """Every rank is ready to step: silence is no longer borne."""
        self._state.silence_s = SILENCE_S

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Call `on_failure`, on another thread, when a rank is lost."""
        self._state.on_failure = on_failure
        if self._state.failed.is_set():
            on_failure(self._failure())

    def hear(self, on_kv: Callable[[int, bytes], None]) -> None:
        """Call `on_kv` with rank and message when a rank says something of KV transfer."""
        self._state.on_kv = on_kv

    def tell(self, rank: int, payload: bytes) -> None:
        """Say something of KV transfer to a rank; to a lost one, nothing."""
        channel = self._state.members[rank - 1].channel
        assert channel is not None
        with contextlib.suppress(OSError):  # the watching thread finds out, and says so
            channel.send(Kind.KV, payload)

    def send(self, plan: StepPlan) -> None:
        """Have every other rank execute the plan. Raises RankFailed."""
        if self._state.failure is not None:
            raise self._failure()
        data = plan_bytes.pack(plan)
        try:
            for member in self._state.members:
                assert member.channel is not None
                member.channel.send(Kind.STEP, data)
        except OSError as error:
            self.give_up(error)
            raise

    def give_up(self, error: Exception) -> None:
        """An exchange failed here: end every rank. Raises what was wrong with another, if any."""
        # the watching thread may be about to find out
        if not self._state.failed.wait(END_S):
            self._state.fail(error)
        if self._state.failure is not error:
            raise self._failure() from error

    def close(self) -> None:
        """End the other ranks."""
        self._finalizer()

    def _failure(self) -> Exception:
        assert self._state.failure is not None
        return self._state.failure

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Take in the connections of all ranks; others are turned away."""
        missing = {member.rank: member for member in self._state.members}
        listener.settimeout(WATCH_S)
        deadline = time.monotonic() + START_S
        while missing:
            for member in missing.values():
                if member.process.poll() is not None:
                    raise RankFailed(f"rank {member.rank} {member.how_it_died()} while starting")
            if time.monotonic() > deadline:
                raise RankFailed(f"rank {min(missing)} did not connect within {START_S:.0f} s")
            with contextlib.suppress(TimeoutError):
                channel = Channel(listener.accept()[0])
                rank = _greet(channel, token)
                if rank not in missing:
                    channel.close()
                else:
                    missing.pop(rank).channel = channel


def _spawn(config: EngineConfig, rank: int, master: str, token: str) -> _Member:
    size = config.tensor_parallel_size
    options = {
        "engine": to_mapping(config),
        "rank": rank,
        "world_size": size,
        "local_rank": rank,
        "local_size": size,
        "master": master,
        "token": token,
        "log_level": logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower(),
    }
    command = [sys.executable, "-P", "-m", "quire.engine.parallel.rank"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(options).encode() + b"\n")
        process.stdin.close()
    return _Member(rank, process)


def _greet(channel: Channel, token: str) -> int | None:
    """The rank at the other end; None for whoever does not know the token."""
    channel.set_timeout(HELLO_S)
    try:
        hello = channel.receive_json(Kind.HELLO)
        known = hmac.compare_digest(str(hello["token"]), token)
        rank = int(hello["rank"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    channel.set_timeout(None)
    return rank if known else None


def _watch(state: _State) -> None:
    """Runs on its own thread until the gang ends: listens to the ranks, fails with the first."""
    with selectors.DefaultSelector() as selector:
        for member in state.members:
            assert member.channel is not None
            selector.register(member.channel.fileno(), selectors.EVENT_READ, member)
        while not state.ending:
            for key, _ in selector.select(WATCH_S):
                _listen(state, key.data)
            now = time.monotonic()
            for member in state.members:
                if now - member.heard > state.silence_s:
                    silent = f"has given no sign of life for {state.silence_s:.0f} s"
                    state.fail(RankFailed(_says(member, silent)))


def _listen(state: _State, member: _Member) -> None:
    assert member.channel is not None
    try:
        kind, payload = member.channel.receive()
        member.heard = time.monotonic()
        if kind is Kind.FAILED:
            state.fail(_reported(state, member, json.loads(payload)))
        elif kind is Kind.KV and state.on_kv is not None:
            state.on_kv(member.rank, payload)
        elif kind is not Kind.BEAT:
            state.fail(RankFailed(_says(member, f"sent {kind.name}")))
    except (OSError, EOFError, ValueError):
        if not state.ending:
            state.fail(RankFailed(_says(member, member.how_it_died())))


def _reported(state: _State, member: _Member, report: dict[str, object]) -> Exception:
    """What a rank said before it ended: a refusal is the user's to mend."""
    if report.get("is_refusal"):
        return ValueError(_says(member, f"failed: {report.get('message')}"))
    # a failed exchange is the fault of the rank that died, not of the first that noticed
    dead = (m for m in state.members if m is not member and m.process.poll() is not None)
    for other in dead:
        return RankFailed(_says(other, other.how_it_died()))
    return RankFailed(_says(member, f"failed: {report.get('message')}"))


def _says(member: _Member, what: str) -> str:
    return f"rank {member.rank} (pid {member.process.pid}) {what}"
