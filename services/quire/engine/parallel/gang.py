"""Rank 0's hold on the other ranks: starts them, steps them, notices when one is lost.

    start ──▶ spawned ──all said hello──▶ joined ──all loaded──▶ running
                 │ one dies                  │ one dies or refuses  │ one dies, or is silent
                 ▼                           ▼                      ▼ for SILENCE_S
              ValueError or RankFailed: every rank is ended, nothing of the gang is left

Ranks of this host are processes started here; those of another are started by a process that waits
there (`node`), and connect like the others.

A rank that is lost leaves the others inside an exchange that cannot finish. Ending all of them
closes their connections, which ends rank 0's part of the exchange too: within milliseconds of a
death, within SILENCE_S of a process that hangs, whatever time limit the exchange has.
"""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from typing import TYPE_CHECKING

from quire.engine.parallel import plan_bytes
from quire.engine.parallel.calls import DROP_CACHE, Calls
from quire.engine.parallel.channel import SILENCE_S, Kind
from quire.engine.parallel.gathering import Gathering
from quire.engine.parallel.group import TorchGroup, serve_store
from quire.engine.parallel.processes import END_S
from quire.engine.parallel.spread import Spread
from quire.engine.parallel.watch import RankFailed, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.engine.parallel.gathering import Plan
    from quire.engine.parallel.members import Member
    from quire.engine.scheduler.plan import StepPlan

__all__ = ["Gang", "RankFailed"]

DROP_S = 10.0


class Gang:
    """The ranks beyond the first. `close` ends them; so does the end of this process, however it
    comes."""

    def __init__(self, watch: Watch, calls: Calls, host: str) -> None:
        self._watch, self._host = watch, host
        self.calls = calls
        """What the other ranks are asked beside steps."""
        watch.on_failure.append(calls.fail)
        self._finalizer = weakref.finalize(self, watch.close)

    @property
    def size(self) -> int:
        """Ranks of the engine, the first one included."""
        return len(self._watch.members) + 1

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes of ranks 1, 2 …, each on its host."""
        return tuple(member.pid for member in self._watch.members)

    def members(self) -> tuple[Member, ...]:
        """The other ranks, with what each has told last. Any thread; to be read only."""
        return tuple(self._watch.members)

    @classmethod
    def start(cls, plan: Plan, spread: Spread | None) -> Gang:
        """Start the other ranks of this host and wait until all have connected.

        Raises RankFailed when one cannot, ValueError when they cannot be spread so, OSError when
        the address for other hosts cannot be listened on.
        """
        with Gathering(plan, spread or Spread()) as gathering:
            calls = Calls(partial(_tell, gathering.members))
            gang = cls(Watch(gathering.members, gathering.nodes, calls.hear), calls, gathering.host)
            try:
                gathering.wait()
            except BaseException:
                gang.close()
                raise
        return gang

    def join(self) -> TorchGroup:
        """Make the group of all ranks, which from then on load their parts, and watch over them.

        Raises RankFailed, RuntimeError.
        """
        store, port = serve_store(self._host, self.size)
        for member in self._watch.members:
            assert member.channel is not None
            try:
                member.channel.send_json(Kind.WELCOME, {"store_port": port})
            except OSError:
                raise RankFailed(f"{member.name} {member.how_it_died()}") from None
        self._watch.start()
        group = TorchGroup(store, 0, self.size, self._host)
        self.watch(lambda _: group.abort())
        return group

    def loaded(self) -> None:
        """Every rank is ready to step: silence is no longer borne."""
        self._watch.silence_s = SILENCE_S

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Call `on_failure`, on another thread, when a rank is lost."""
        self._watch.on_failure.append(on_failure)
        if self._watch.failed.is_set():
            on_failure(self._failure())

    def send(self, plan: StepPlan) -> None:
        """Have every other rank execute the plan. Raises RankFailed."""
        self.check()
        data = plan_bytes.pack(plan)
        try:
            for member in self._watch.members:
                assert member.channel is not None
                member.channel.send(Kind.STEP, data)
        except OSError as error:
            self.give_up(error)
            raise

    def check(self) -> None:
        """Raises RankFailed when a rank has been lost: what was exchanged since means nothing."""
        if self._watch.failure is not None:
            raise self._failure()

    def drop_caches(self) -> int:
        """Have every other rank give the memory of its KV blocks back, none of which is held.
        Returns bytes. Raises OSError."""
        asked = [self.calls.ask(rank, DROP_CACHE) for rank in range(1, self.size)]
        return sum(answer.result(DROP_S) for answer in asked)

    def give_up(self, error: Exception) -> None:
        """An exchange failed here: end every rank. Raises what was wrong with another, if any."""
        # the watching thread may be about to find out
        if not self._watch.failed.wait(2 * END_S):
            self._watch.fail(error)
        if self._watch.failure is not error:
            raise self._failure() from error

    def close(self) -> None:
        """End the other ranks."""
        self._finalizer()

    def _failure(self) -> Exception:
        assert self._watch.failure is not None
        return self._watch.failure


def _tell(members: list[Member], rank: int, payload: bytes) -> None:
    channel = members[rank - 1].channel
    assert channel is not None
    with contextlib.suppress(OSError):  # the watching thread finds out, and says so
        channel.send(Kind.CALL, payload)
