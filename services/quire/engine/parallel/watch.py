"""Listens to the other ranks and their hosts; with the first that is lost, all of them end."""

from __future__ import annotations

import json
import selectors
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.engine.parallel.channel import Kind
from quire.engine.parallel.members import Member, Node
from quire.engine.parallel.vitals import Vitals

if TYPE_CHECKING:
    from collections.abc import Callable

LOADING_SILENCE_S = 60.0
"""While a rank loads, a library call may keep its threads from showing life."""
WATCH_S = 0.25


class RankFailed(RuntimeError):
    """A rank of the engine was lost, and with it the engine."""


@dataclass
class Watch:
    """What the watching thread shares with the gang; keeps the gang itself collectable."""

    members: list[Member]
    nodes: list[Node]
    on_call: Callable[[int, bytes], None]
    """Called with rank and message when a rank answers, or tells of something."""
    silence_s: float = LOADING_SILENCE_S
    failure: Exception | None = None
    failed: threading.Event = field(default_factory=threading.Event)
    is_ending: bool = False
    on_failure: list[Callable[[Exception], None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def all(self) -> list[Member | Node]:
        """Who has a connection."""
        return [*self.members, *self.nodes]

    def start(self) -> None:
        """Everyone is connected: watch them from now on, on a thread."""
        for one in self.all:
            one.heard = time.monotonic()
        threading.Thread(target=_run, args=(self,), name="ranks", daemon=True).start()

    def fail(self, error: Exception) -> None:
        """The first failure counts: every rank ends now."""
        with self.lock:
            if self.failure is not None or self.is_ending:
                return
            self.failure, self.is_ending = error, True
        for member in self.members:
            member.kill()
        self._disconnect()
        self.failed.set()
        for told in tuple(self.on_failure):
            told(error)

    def close(self) -> None:
        """Every rank ends, and nothing failed."""
        with self.lock:
            was_ending, self.is_ending = self.is_ending, True
        if was_ending:
            return
        for member in self.members:
            if member.channel is None:  # it does not know of us yet
                member.kill()
        self._disconnect()

    def _disconnect(self) -> None:
        for one in self.all:
            if one.channel is not None:
                one.channel.close()  # which ends the process
        for member in self.members:
            member.end()


def _run(watch: Watch) -> None:
    """Until the gang ends."""
    with selectors.DefaultSelector() as selector:
        for one in watch.all:
            assert one.channel is not None
            selector.register(one.channel.fileno(), selectors.EVENT_READ, one)
        while not watch.is_ending:
            for key, _ in selector.select(WATCH_S):
                _listen(watch, key.data)
            now = time.monotonic()
            for one in watch.all:
                if now - one.heard > watch.silence_s:
                    silent = f"has given no sign of life for {watch.silence_s:.0f} s"
                    watch.fail(RankFailed(f"{one.name} {silent}"))


def _listen(watch: Watch, one: Member | Node) -> None:
    """Take in what has arrived of one of them."""
    assert one.channel is not None
    try:
        while not watch.is_ending:
            kind, payload = one.channel.receive()
            one.heard = time.monotonic()
            _take(watch, one, kind, payload)
            if not one.channel.has_pending:
                return
    except (OSError, EOFError, ValueError):
        if not watch.is_ending:
            watch.fail(RankFailed(f"{one.name} {one.how_it_died()}"))


def _take(watch: Watch, one: Member | Node, kind: Kind, payload: bytes) -> None:
    match one, kind:
        case Member(), Kind.BEAT:
            one.vitals = Vitals.unpack(payload)
        case Node(), Kind.BEAT:
            pass
        case Member(), Kind.FAILED:
            watch.fail(_reported(watch, one, json.loads(payload)))
        case Member(), Kind.CALL:
            watch.on_call(one.rank, payload)
        case Node(), Kind.ENDED:
            one.note_end(payload)  # the rank's own connection is closed too
        case _:
            watch.fail(RankFailed(f"{one.name} sent {kind.name}"))


def _reported(watch: Watch, member: Member, report: dict[str, object]) -> Exception:
    """What a rank said before it ended: a refusal is the user's to mend."""
    said = f"{member.name} failed: {report.get('message')}"
    if report.get("is_refusal"):
        return ValueError(said)
    # a failed exchange is the fault of the rank that died, not of the first that noticed
    for other in watch.members:
        if other is not member and other.has_ended:
            return RankFailed(f"{other.name} {other.how_it_died()}")
    return RankFailed(said)
