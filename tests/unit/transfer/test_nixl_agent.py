"""One-sided writes that are slow, fail or are given up, over a library that does as it is told."""

from __future__ import annotations

import ctypes

import pytest

pytest.importorskip("nixl_cu12", reason="NIXL is not installed")

from transfers import Side

from quire.proto import transfer_pb2
from quire.transfer import nixl_agent
from quire.transfer.frames import HEADER_BYTES, Header, Kind, pack
from quire.transfer.landing import SLOT_BYTES
from quire.transfer.memory import HostMemory
from quire.transfer.nixl_agent import Agent, Write

BLOCK_BYTES = 4096
NUM_BLOCKS = 4


class Library:
    """Stands in for `nixl_agent`: notes what a write would read, ends it when the test says so."""

    def __init__(self, *_) -> None:
        self.rows: list[list[tuple[int, int, int]]] = []
        self.reads: list[list[tuple[int, int, int]]] = []
        self.states: list[str] = []

    def register_memory(self, *_) -> None: ...

    def release_xfer_handle(self, handle) -> None: ...

    def add_remote_agent(self, metadata: bytes) -> bytes:
        return metadata

    def prep_xfer_dlist(self, name, rows, memory):
        self.rows.append(rows)
        return rows

    def make_prepped_xfer(self, kind, local, local_places, remote, remote_places):
        self.reads.append([local[place] for place in local_places])
        self.states.append("PROC")
        return len(self.states) - 1

    def transfer(self, handle) -> None: ...

    def check_xfer_state(self, handle: int) -> str:
        return self.states[handle]


@pytest.fixture
def agent(monkeypatch) -> Agent:
    monkeypatch.setattr(nixl_agent, "nixl_agent", Library)
    monkeypatch.setattr(nixl_agent, "POLL_S", 0.0)
    return Agent("me", HostMemory(bytearray(NUM_BLOCKS * BLOCK_BYTES), BLOCK_BYTES))


def attach(agent: Agent, name: bytes):
    landing = transfer_pb2.KvLanding(agent=name, base=1 << 20, slot_bytes=SLOT_BYTES, num_slots=2)
    return agent.attach(landing)


def head(sequence: int) -> bytes:
    return pack(Header(Kind.DATA, length=BLOCK_BYTES, sequence=sequence))


def write(agent: Agent, target, sequence: int) -> Write:
    return agent.post(target, 0, head(sequence), [agent._memory.view(1, 0, BLOCK_BYTES)])


def head_that_is_read(agent: Agent, write: Write) -> bytes:
    address, length, _ = agent._agent.reads[write.handle][-1]
    assert length == HEADER_BYTES
    return ctypes.string_at(address, length)


def test_frames_to_two_peers_keep_their_heads(agent) -> None:
    one, other = attach(agent, b"one")[0], attach(agent, b"other")[0]
    first, second = write(agent, one, 1), write(agent, other, 2)
    assert head_that_is_read(agent, first) == head(1)[:HEADER_BYTES]
    assert head_that_is_read(agent, second) == head(2)[:HEADER_BYTES]


def test_a_write_in_flight_is_told_to_its_peer_alone_until_it_ends(agent) -> None:
    target, drained = attach(agent, b"one")
    assert drained
    given_up = write(agent, target, 1)
    assert not attach(agent, b"one")[1]
    assert attach(agent, b"other")[1]
    agent._agent.states[given_up.handle] = "DONE"
    assert attach(agent, b"one")[1]
    assert given_up.is_done


def test_a_link_hears_of_writes_that_an_earlier_one_left_until_they_end(agent) -> None:
    earlier, _ = attach(agent, b"one")
    given_up = write(agent, earlier, 1)
    target, drained = attach(agent, b"one")
    write(agent, target, 2)  # its own goes to slots that are not quarantined
    assert not drained and not agent.is_drained(target)
    agent._agent.states[given_up.handle] = "DONE"
    assert agent.is_drained(target)


def test_a_write_that_fails_is_said_and_over(agent) -> None:
    target, _ = attach(agent, b"one")
    broken = write(agent, target, 1)
    agent._agent.states[broken.handle] = "ERR"
    assert attach(agent, b"one")[1], "found by another link first"
    with pytest.raises(OSError, match="ERR"):
        agent.poll(broken)


def test_heads_are_lent_and_come_back(agent) -> None:
    target, _ = attach(agent, b"one")
    writes = [write(agent, target, n) for n in range(nixl_agent.MAX_WRITES)]
    with pytest.raises(OSError, match="too many"):
        write(agent, target, 0)
    agent._agent.states[:] = ["DONE"] * len(writes)
    for each in writes:
        agent.poll(each)
    assert not write(agent, target, 1).is_done


def test_a_library_that_cannot_start_is_said_at_once(monkeypatch) -> None:
    """Such as with UCX_TLS without anything that leads anywhere."""

    def broken(*_: object) -> None:
        raise RuntimeError("NIXL_ERR_BACKEND")

    monkeypatch.setattr(nixl_agent, "nixl_agent", broken)
    with (
        pytest.raises(OSError, match="nixl cannot start: NIXL_ERR_BACKEND"),
        Side(kv_transports=("nixl",)),
    ):
        pass
