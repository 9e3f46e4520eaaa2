"""What to do next, from what is wanted and what is seen. No I/O.

(not there) --Place--> placing -> starting -> ready --Stop--> stopping -> (not there)
                                     ▲  └ dies ┘
                                 restarting, failed: its supervisor tries again by itself
                                 refused ──Stop──▶ (not there), until somebody asks again
unreachable: its supervisor does not answer; its engine may well serve, so it is left alone
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


class State(StrEnum):
    """Of a replica."""

    PLACING = "placing"
    """Ray has not started its supervisor yet."""
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    """The engine died; its supervisor waits before the next attempt."""
    FAILED = "failed"
    """The engine cannot be started, or not again; its supervisor waits before the next attempt."""
    REFUSED = "refused"
    """The engine says that it cannot serve with these options."""
    UNREACHABLE = "unreachable"
    STOPPING = "stopping"


@dataclass(frozen=True)
class Wanted:
    """A replica that there should be."""

    name: str
    model: str
    digest: str
    """Of everything that only a restart can change."""
    role: str


@dataclass(frozen=True)
class Seen:
    """A replica that there is."""

    name: str
    model: str
    state: State
    digest: str | None = None
    """None: not known yet."""
    role: str | None = None


@dataclass(frozen=True)
class Place:
    """Start a supervisor, which starts the engine."""

    name: str


@dataclass(frozen=True)
class SetRole:
    """Have the engine change its routing weights."""

    name: str
    role: str


@dataclass(frozen=True)
class Stop:
    """Take it out of the topology, drain it, and give its place back."""

    name: str


Action = Place | SetRole | Stop


def pod_names(pool: str, replicas: int) -> list[str]:
    """Names of a pool's pods; when it shrinks, the last ones go."""
    return [f"{pool}-{number}" for number in range(replicas)]


def decide(
    wanted: Iterable[Wanted], seen: Mapping[str, Seen], refused: Collection[str] = ()
) -> list[Action]:
    """Every action that is due. Doing them, and asking again, ends with what is wanted, but for
    `refused`: replicas whose engines would refuse their options again. They hold no place.

    What runs with an old digest is replaced one replica at a time per model, and a ready one only
    while all others of the model are ready.
    """
    actions: list[Action] = []
    by_name = {one.name: one for one in wanted}
    surplus = sorted(seen.keys() - by_name.keys())
    actions += [Stop(name) for name in surplus if seen[name].state is not State.STOPPING]
    for name, want in sorted(by_name.items()):
        have = seen.get(name)
        if have is None:
            actions += [Place(name)] if name not in refused else []
        elif have.state is State.REFUSED:
            actions.append(Stop(name))
        elif have.role not in (None, want.role) and have.state is not State.STOPPING:
            actions.append(SetRole(name, want.role))
    return actions + [Stop(name) for name in _outdated(by_name, seen)]


def _outdated(wanted: Mapping[str, Wanted], seen: Mapping[str, Seen]) -> list[str]:
    """Replicas to be replaced now, at most one per model."""
    chosen: list[str] = []
    for model in sorted({want.model for want in wanted.values()}):
        own = {name: want for name, want in wanted.items() if want.model == model}
        old = [
            name
            for name, want in sorted(own.items())
            if name in seen
            and seen[name].digest not in (None, want.digest)
            and seen[name].state is not State.REFUSED
        ]
        unready = {n for n in own if n not in seen or seen[n].state is not State.READY}
        if any(name in seen and seen[name].state is State.STOPPING for name in own):
            continue
        # what does not serve goes first, and need not wait for the others
        broken = [name for name in old if name in unready]
        reachable = [name for name in broken if seen[name].state is not State.UNREACHABLE]
        if reachable:
            chosen.append(reachable[0])
        elif old and not unready:
            chosen.append(old[0])
    return chosen
