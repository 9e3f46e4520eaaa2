"""Both sides of a transfer under any order of inputs: every block comes back exactly once, and so
does every place; what is loaded, sent, stored and delivered is the block's own bytes."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.transfer.frames import Entry
from quire.transfer.receiving import ReceivingState, ReceivingTransfer
from quire.transfer.sending import SendingState, SendingTransfer
from quire.transfer.state import (
    Commit,
    Committed,
    Committing,
    Delivered,
    Ended,
    Fail,
    Grant,
    Lease,
    Load,
    Offered,
    Open,
    Released,
    Reply,
    Resend,
    Store,
    TransferRef,
    Vacate,
)

REF = TransferRef(7, 1, 9)
BLOCKS = 6
PIECES = 2
LENGTHS = (100, 50)


class Books:
    """Blocks that one side holds, from what it was given and what it gave back."""

    def __init__(self):
        self.given = []
        self.back = []
        self.ended = []

    def take(self, event):
        assert not self.ended, "an event after the last one"
        match event:
            case Delivered(_, _, slot):
                self.back.append(slot)
            case Released(_, slots):
                self.back.extend(slots)
            case Ended():
                self.ended.append(event)

    def check(self, is_over):
        assert len(self.back) == len(set(self.back)), "a block came back twice"
        assert set(self.back) <= set(self.given), "a block came back that was never given"
        assert bool(self.ended) == is_over
        if self.ended:
            assert sorted(self.back) == sorted(self.given), "a block was kept"


class Places:
    """A side's memory: what lies where, and what is being copied."""

    def __init__(self, count):
        self.free = list(range(500, 500 + count))
        self.lying = {}  # place -> pieces, or the block that was loaded
        self.copied = set()

    def claim(self, count):
        claimed, self.free = self.free[:count], self.free[count:]
        self.lying.update((place, {}) for place in claimed)
        return claimed

    def vacate(self, places):
        for place in places:
            assert place not in self.copied, "vacated in the middle of a copy"
            del self.lying[place]  # twice is a KeyError
            self.free.append(place)

    def begin(self, places):
        assert self.copied.isdisjoint(places)
        assert set(places) <= self.lying.keys()
        self.copied.update(places)

    def end(self, places):
        self.copied.difference_update(places)


class Pair(RuleBasedStateMachine):
    """Two sides and a network that drops, repeats, delays, reorders and damages; each side with
    fewer places than blocks, and copies that take their time and may fail."""

    @initialize(
        ranks=st.sampled_from([1, 2]), calm=st.booleans(), rooms=st.tuples(*[st.integers(1, 7)] * 3)
    )
    def begin(self, ranks, calm, rooms):
        self.now = 0.0
        self.calm = calm  # without trouble, so that commits are reached too
        self.ranks = range(ranks)
        legs = dict.fromkeys(self.ranks, PIECES)
        self.receiver = ReceivingTransfer(REF, BLOCKS, legs, Lease(5, 0))
        self.senders = [SendingTransfer(REF, LENGTHS, Lease(5, 0)) for _ in self.ranks]
        self.books = Books()
        self.sender_books = [Books() for _ in self.ranks]
        self.places = Places(rooms[2])
        self.sender_places = [Places(rooms[rank]) for rank in self.ranks]
        self.pool = {}  # slot -> what was stored there
        self.wire = []
        self.next_grant = 0
        self.next_offer = [0] * ranks
        self.delivered_content = {}
        self.late_slots = 1000
        for rank in self.ranks:
            self.do_sender(rank, self.senders[rank].begin())

    def do_receiver(self, effects):
        for effect in effects:
            match effect:
                case Reply(rank, message):
                    self.wire.append(("S", rank, message))
                case Store(_, _, place):
                    self.places.begin([place])
                    self.wire.append(("C", 0, effect))
                case Vacate(places):
                    self.places.vacate(places)
                case _:
                    self.books_take(effect)
        if claimed := self.places.claim(self.receiver.num_ready):
            self.do_receiver(self.receiver.placed(claimed))

    def books_take(self, event):
        if isinstance(event, Delivered):
            assert self.pool[event.slot] == event.block, "delivered before it was stored"
        if self.books.ended and isinstance(event, Released):
            # what is granted after the end comes straight back; the only thing that still does
            assert set(event.slots).isdisjoint(self.books.given)
            return
        self.books.take(event)

    def do_sender(self, rank, effects):
        for effect in effects:
            match effect:
                case Reply(_, message):
                    self.wire.append(("R", rank, message))
                case Load(_, _, places):
                    self.sender_places[rank].begin(places)
                    self.wire.append(("C", rank, effect))
                case Vacate(places):
                    self.sender_places[rank].vacate(places)
                case _:
                    self.sender_books[rank].take(effect)
        if claimed := self.sender_places[rank].claim(len(self.senders[rank].unplaced)):
            self.do_sender(rank, self.senders[rank].placed(claimed))

    # ---- copies

    def copy(self, rank, errand, error=""):
        """A copy is done."""
        if isinstance(errand, Load):
            books, places = self.sender_books[rank], self.sender_places[rank]
            assert set(errand.slots).isdisjoint(books.back), "read after it was given back"
            for block, place in zip(errand.blocks, errand.places, strict=True):
                places.lying[place] = block
            places.end(errand.places)
            self.do_sender(rank, self.senders[rank].loaded(errand.blocks, error))
        else:
            assert errand.slot not in self.books.back, "written after it was given back"
            whole = {(r, p): errand.block * 10 + p for r in self.ranks for p in range(PIECES)}
            assert self.places.lying[errand.place] == whole, "an unverified byte was stored"
            if not error:
                self.pool[errand.slot] = errand.block
            self.places.end([errand.place])
            self.places.vacate([errand.place])
            self.do_receiver(self.receiver.stored(errand.block, error))

    # ---- callers

    @precondition(lambda self: self.next_grant < BLOCKS)
    @rule(count=st.integers(1, BLOCKS))
    def grant(self, count):
        count = min(count, BLOCKS - self.next_grant)
        slots = [100 + self.next_grant + i for i in range(count)]
        if not self.receiver.is_over:
            self.books.given += slots
        self.do_receiver(self.receiver.grant(self.next_grant, slots))
        self.next_grant += count

    @rule(data=st.data(), count=st.integers(1, BLOCKS))
    def offer(self, data, count):
        rank = data.draw(st.sampled_from(self.ranks))
        first = self.next_offer[rank]
        count = min(count, BLOCKS - first)
        if not self.senders[rank].is_live or not count:
            return
        slots = [first + i for i in range(count)]
        self.sender_books[rank].given += slots
        self.next_offer[rank] += count
        self.do_sender(rank, self.senders[rank].offer(first, slots))
        if self.next_offer[rank] == BLOCKS:
            commit = Commit(BLOCKS, BLOCKS * 16, b"x")
            self.do_sender(rank, self.senders[rank].commit(commit, self.now))

    @rule(data=st.data())
    def write(self, data):
        self.write_one(data.draw(st.sampled_from(self.ranks)))

    @rule()
    def write_all(self):
        for rank in self.ranks:
            while self.senders[rank].has_pieces:
                self.write_one(rank)

    def write_one(self, rank):
        taken = self.senders[rank].take(250, 8)
        pieces = [piece for piece, _ in taken]
        if not pieces:
            return
        for (block, _), place in taken:
            assert self.sender_places[rank].lying[place] == block, "sent before it was loaded"
        entries = [Entry(block, piece, block * 10 + piece) for block, piece in pieces]
        self.senders[rank].summed(zip(pieces, [e.checksum for e in entries], strict=True))
        self.wire.append(("R", rank, entries))
        self.wire.append(("W", rank, pieces))  # the transport is done reading, some time later

    # ---- the network

    def deliver(self, item, damaged=False):
        to, rank, message = item
        if to == "C":
            self.copy(rank, message)
        elif to == "W":
            self.do_sender(rank, self.senders[rank].written(message, self.now))
        elif to == "S":
            self.to_sender(rank, message)
        else:
            self.to_receiver(rank, message, damaged)

    def to_sender(self, rank, message):
        sender = self.senders[rank]
        match message:
            case Grant(first, count):
                effects = sender.granted(first, count, self.now)
            case Committed():
                effects = sender.confirmed()
            case Fail(failure):
                effects = sender.refused(failure)
            case Resend(block, piece):
                effects = sender.damaged([(block, piece)])
            case list():
                effects = sender.acked(message, self.now)
        self.do_sender(rank, effects)

    def to_receiver(self, rank, message, damaged):
        match message:
            case Open(count):
                self.receiver.offered(rank, count)
                self.do_receiver(self.receiver.opened(rank, self.now))
            case Committing(commit):
                self.do_receiver(self.receiver.commit(rank, commit, self.now))
            case Fail(failure):
                self.do_receiver(self.receiver.refused(failure))
            case Offered(count):
                self.receiver.offered(rank, count)
                self.do_receiver([])
            case list():
                good = []
                for entry in message:
                    place = self.receiver.place(rank, entry.block, entry.piece)
                    if place is None:
                        if self.receiver.knows(rank, entry.block, entry.piece):
                            good.append((entry.block, entry.piece))
                        continue
                    assert place not in self.places.copied, "written in the middle of a copy"
                    value = -1 if damaged else entry.checksum
                    self.places.lying[place][rank, entry.piece] = value  # of a claimed place
                    effects = self.receiver.landed(rank, entry, not damaged, self.now)
                    self.do_receiver(effects)
                    if not damaged:
                        good.append((entry.block, entry.piece))
                self.wire.append(("S", rank, good))

    @precondition(lambda self: self.wire)
    @rule()
    def arrive(self):
        self.deliver(self.wire.pop(0))

    @precondition(lambda self: self.wire)
    @rule()
    def arrive_all(self):
        for _ in range(200):
            if self.wire:
                self.deliver(self.wire.pop(0))

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), fault=st.sampled_from(["drop", "repeat", "damage", "late"]))
    def misbehave(self, data, fault):
        if self.calm and fault == "drop":
            fault = "repeat"
        index = data.draw(st.integers(0, len(self.wire) - 1))
        item = self.wire[index]
        if item[0] in "WC":
            return  # not of the network
        if fault == "repeat":
            self.deliver(item)
            return
        del self.wire[index]
        if fault == "damage":
            self.deliver(item, damaged=True)
        elif fault == "late":
            self.wire.append(item)

    # ---- trouble

    @precondition(lambda self: not self.calm and any(i[0] == "C" for i in self.wire))
    @rule()
    def fail_a_copy(self):
        index = next(i for i, item in enumerate(self.wire) if item[0] == "C")
        _, rank, errand = self.wire.pop(index)
        self.copy(rank, errand, "the device is gone")

    @precondition(lambda self: not self.calm)
    @rule(seconds=st.sampled_from([0.1, 2.0, 6.0]))
    def wait(self, seconds):
        self.now += seconds
        self.do_receiver(self.receiver.expire(self.now))
        for rank in self.ranks:
            self.do_sender(rank, self.senders[rank].expire(self.now))

    @precondition(lambda self: not self.calm)
    @rule()
    def cancel_receiver(self):
        self.do_receiver(self.receiver.cancel())

    @precondition(lambda self: not self.calm)
    @rule(data=st.data())
    def cancel_sender(self, data):
        rank = data.draw(st.sampled_from(self.ranks))
        self.do_sender(rank, self.senders[rank].cancel())

    @precondition(lambda self: not self.calm)
    @rule(data=st.data(), end=st.sampled_from(["receiver", "sender", "both"]))
    def break_link(self, data, end):
        rank = data.draw(st.sampled_from(self.ranks))
        if end != "sender":
            self.do_receiver(self.receiver.lost(rank))
        if end != "receiver":
            self.wire = [i for i in self.wire if i[0] != "W" or i[1] != rank]
            self.do_sender(rank, self.senders[rank].lost())

    @invariant()
    def every_block_has_one_owner(self):
        if not hasattr(self, "books"):
            return
        self.books.check(self.receiver.is_over)
        for rank in self.ranks:
            self.sender_books[rank].check(self.senders[rank].is_over)
            if self.senders[rank].is_over:
                assert not self.sender_places[rank].lying, "a place was kept"
        if self.receiver.is_over:
            assert not self.places.lying, "a place was kept"
        if self.receiver.state is ReceivingState.COMMITTED:
            assert self.books.ended[0].commit.blocks == BLOCKS
            assert all(s.state is not SendingState.OPENING for s in self.senders)

    def teardown(self):
        """Time alone frees everything, whatever was lost; copies end in any case."""
        if not hasattr(self, "books"):
            return
        self.wire = [item for item in self.wire if item[0] == "C"]
        for rank in self.ranks:
            self.do_sender(rank, self.senders[rank].lost())
        self.now += 100
        self.do_receiver(self.receiver.expire(self.now))
        while self.wire:
            to, rank, errand = self.wire.pop(0)
            if to == "C":
                self.copy(rank, errand)
        self.every_block_has_one_owner()
        assert self.receiver.is_over
        assert all(sender.is_over for sender in self.senders)


TestPair = Pair.TestCase
TestPair.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
