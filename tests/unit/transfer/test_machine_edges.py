"""Single edges of both sides of a transfer, by name; `test_machines` takes them in any order."""

import pytest

from quire.transfer.frames import Entry, digest
from quire.transfer.receiving import ReceivingState, ReceivingTransfer
from quire.transfer.sending import SendingState, SendingTransfer
from quire.transfer.state import (
    Commit,
    Committed,
    Delivered,
    Ended,
    Fail,
    Failure,
    Grant,
    Lease,
    Load,
    Released,
    Reply,
    Resend,
    Store,
    TransferRef,
    Vacate,
)

REF = TransferRef(7, 1, 9)


def granted(machine, first, slots):
    """Grant blocks that have places, as in host memory."""
    effects = machine.grant(first, slots)
    return [*effects, *machine.placed(slots)]


def receiving(state):
    machine = ReceivingTransfer(REF, 2, {0: 1}, Lease(5, 0))
    granted(machine, 0, [50, 51])
    if state != "promised":
        machine.opened(0, 0)
    if state == "committed":
        entries = [Entry(0, 0, 1), Entry(1, 0, 2)]
        for entry in entries:
            machine.landed(0, entry, True, 0)
            machine.stored(entry.block)
        machine.commit(0, Commit(2, 32, b"", digest(entries)), 0)
    if state == "failed":
        machine.cancel()
    assert machine.state == state
    return machine


@pytest.mark.parametrize("state", ["promised", "receiving", "committed", "failed"])
@pytest.mark.parametrize(
    ("edge", "failure"),
    [
        (lambda m: m.cancel(), Failure.CANCELLED),
        (lambda m: m.expire(6), Failure.LEASE),
        (lambda m: m.lost(0), Failure.LOST),
        (lambda m: m.refused(Failure.PEER_CANCELLED), Failure.PEER_CANCELLED),
    ],
)
def test_a_receiver_ends_from_every_state_and_only_once(state, edge, failure):
    machine = receiving(state)
    effects = edge(machine)
    if state in ("committed", "failed"):
        assert effects == []
        return
    events = [e for e in effects if not isinstance(e, Reply)]
    assert events[:2] == [Vacate((50, 51)), Released(REF, (50, 51))]
    assert events[-1].failure is failure
    assert edge(machine) == []


@pytest.mark.parametrize(
    ("commit", "why"),
    [
        (Commit(2, 32, b"", 1), "digest"),
        (Commit(1, 16, b"", 1), "pieces arrived"),
        (Commit(3, 48, b"", 1), "promised were 2"),
        (Commit(0, 0, b"", 1), "promised were 2"),
    ],
)
def test_a_commit_that_does_not_fit_is_no_success(commit, why):
    machine = receiving("receiving")
    for block in (0, 1):
        machine.landed(0, Entry(block, 0, 5), True, 0)
        machine.stored(block)
    ended = machine.commit(0, commit, 0)[-1]
    assert ended.failure is Failure.INCOMPLETE
    assert why in ended.detail


def test_a_block_damaged_twice_fails_and_once_is_asked_for_again():
    machine = receiving("receiving")
    assert machine.landed(0, Entry(1, 0, 5), False, 0) == [Reply(0, Resend(1, 0))]
    effects = machine.landed(0, Entry(1, 0, 5), False, 0)
    assert effects[-1].failure is Failure.CHECKSUM
    assert Released(REF, (50, 51)) in effects


def test_a_receiver_waits_for_every_rank():
    machine = ReceivingTransfer(REF, 1, {0: 1, 2: 1}, Lease(5, 0))
    granted(machine, 0, [50])
    for rank in (0, 2):
        assert machine.opened(rank, 0) == [Reply(rank, Grant(0, 1))]
    assert machine.landed(0, Entry(0, 0, 5), True, 0) == []
    assert machine.commit(0, Commit(1, 16, b"m", digest([Entry(0, 0, 5)])), 0) == []
    assert machine.landed(2, Entry(0, 0, 6), True, 0) == [Store(0, 50, 50)]
    assert machine.stored(0) == [Delivered(REF, 0, 50)]
    last = machine.commit(2, Commit(1, 16, b"", digest([Entry(0, 0, 6)])), 0)[-1]
    assert last.failure is None and last.commit.meta == b"m"


def test_a_grant_twice_or_beyond_the_promise_is_an_error_and_binds_nothing():
    machine = receiving("promised")
    with pytest.raises(ValueError, match="granted already"):
        machine.grant(1, [60])
    with pytest.raises(ValueError, match="of a transfer of 2"):
        machine.grant(2, [60])
    assert Released(REF, (50, 51)) in machine.cancel()


def test_a_sender_that_waits_for_its_caller_lives_by_keeps_and_one_with_data_by_progress():
    machine = SendingTransfer(REF, (10,), Lease(5, 0))
    machine.begin()
    machine.heard(4)
    assert machine.expire(8) == []
    machine.granted(0, 1, 8)
    machine.offer(0, [3])
    machine.placed([3])
    machine.loaded([0])
    machine.heard(12)
    assert machine.expire(14)[-1].failure is Failure.LEASE


def test_a_block_is_not_released_while_the_transport_reads_it():
    machine = SendingTransfer(REF, (10,), Lease(5, 0))
    machine.granted(0, 2, 0)
    machine.offer(0, [3, 4])
    machine.placed([3, 4])
    machine.loaded([0, 1])
    assert [p for p, _ in machine.take(10, 8)] == [(0, 0)]
    effects = machine.cancel()
    assert Released(REF, (4,)) in effects
    assert machine.state is SendingState.DRAINING
    effects = machine.written([(0, 0)], 0)
    assert effects == [Vacate((3,)), Released(REF, (3,)), Ended(REF, Failure.CANCELLED)]


def test_a_block_that_waits_for_a_place_is_not_granted_and_is_not_held_by_anything():
    machine = ReceivingTransfer(REF, 3, {0: 1}, Lease(5, 0))
    machine.opened(0, 0)
    assert machine.grant(0, [50, 51, 52]) == []
    assert (list(machine.unplaced), machine.num_ready) == ([50, 51, 52], 0)
    machine.offered(0, 2)
    machine.offered(0, 1)  # said earlier, heard later
    assert machine.num_ready == 2
    assert machine.placed([7]) == [Reply(0, Grant(0, 1))]
    assert machine.grants() == [Grant(0, 1)]
    assert (machine.num_ready, machine.place(0, 0, 0), machine.place(0, 1, 0)) == (1, 7, None)
    effects = machine.cancel()
    assert effects[1:] == [
        Vacate((7,)), Released(REF, (50, 51, 52)), Ended(REF, Failure.CANCELLED),
    ]  # fmt: skip
    assert machine.num_ready == 0 and not machine.unplaced


@pytest.mark.parametrize("error", ["", "no device"])
def test_a_receiver_that_stores_a_block_ends_after_it(error):
    machine = receiving("receiving")
    assert machine.landed(0, Entry(0, 0, 5), True, 0) == [Store(0, 50, 50)]
    effects = machine.cancel()
    assert effects[1:] == [Vacate((51,)), Released(REF, (51,))]
    assert machine.state is ReceivingState.DRAINING
    assert machine.cancel() == machine.expire(9) == machine.lost(0) == []
    back = Released(REF, (50,)) if error else Delivered(REF, 0, 50)
    assert machine.stored(0, error) == [back, Ended(REF, Failure.CANCELLED)]


def test_a_commit_waits_for_what_is_being_stored():
    machine = receiving("receiving")
    entries = [Entry(0, 0, 5), Entry(1, 0, 6)]
    for entry in entries:
        machine.landed(0, entry, True, 0)
    assert machine.commit(0, Commit(2, 32, b"", digest(entries)), 0) == []
    assert machine.stored(1) == [Delivered(REF, 1, 51)]
    delivered, confirmed, ended = machine.stored(0)
    assert delivered == Delivered(REF, 0, 50)
    assert (confirmed, ended.failure) == (Reply(0, Committed()), None)


def test_a_copy_that_fails_ends_the_transfer_on_either_side():
    machine = receiving("receiving")
    machine.landed(0, Entry(0, 0, 5), True, 0)
    released, told, _, rest, ended = machine.stored(0, "no device")
    assert (released, rest) == (Released(REF, (50,)), Released(REF, (51,)))
    assert told == Reply(0, Fail(Failure.MEMORY, "no device"))
    assert ended == Ended(REF, Failure.MEMORY, "no device")
    sender = SendingTransfer(REF, (10,), Lease(5, 0))
    sender.granted(0, 2, 0)
    sender.offer(0, [3, 4])
    assert sender.placed([8]) == [Load((0,), (3,), (8,))]
    told, vacated, released, ended = sender.loaded([0], "no device")
    assert told == Reply(-1, Fail(Failure.MEMORY, "no device"))
    assert (vacated, released) == (Vacate((8,)), Released(REF, (3, 4)))
    assert ended == Ended(REF, Failure.MEMORY, "no device")


def test_a_sender_holds_what_is_being_loaded_and_nothing_else():
    machine = SendingTransfer(REF, (10,), Lease(5, 0))
    machine.granted(0, 3, 0)
    machine.offer(0, [3, 4, 5])
    machine.placed([8])
    assert list(machine.unplaced) == [4, 5]
    assert not machine.has_pieces
    assert machine.cancel()[1:] == [Released(REF, (4, 5))]
    assert machine.state is SendingState.DRAINING and not machine.unplaced
    assert machine.loaded([0]) == [
        Vacate((8,)), Released(REF, (3,)), Ended(REF, Failure.CANCELLED),
    ]  # fmt: skip
    assert not machine.has_pieces
