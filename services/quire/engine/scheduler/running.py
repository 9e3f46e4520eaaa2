"""The sequences that hold a seat and KV blocks, and how they come by and give up both.

A sequence holds a seat (a row of the step's per-sequence arrays) from `start` to `stop`. While it
runs it owns the blocks of its table; of a prompt that is still being computed the rest is promised.

    block table   [0 ...... num_computed / 16 ......... len(table))    len(table) + num_promised
                  [computed, registered if full][bound, being filled)[promised: not bound yet)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.engine.kv.pool import NoBlocksLeft
from quire.engine.request import BLOCK_SIZE

if TYPE_CHECKING:
    from quire.engine.kv.pool import BlockPool
    from quire.engine.request import Sequence
    from quire.engine.scheduler.batch import Seats
    from quire.engine.scheduler.flight import Flight


class Running:
    """Seats and blocks. `sequences` are those that a step may compute."""

    def __init__(self, pool: BlockPool, seats: Seats, flight: Flight) -> None:
        self.pool = pool
        self.seats = seats
        self._flight = flight
        self.sequences: list[Sequence] = []
        self.reserved_seats = 0
        """Seats that forks of started sequences will take."""
        self.copies: list[tuple[int, int]] = []
        """(source, destination) blocks that the next step copies before it computes."""
        self.cached_tokens = 0
        """Tokens found in the prefix cache, in all."""

    def admit(self, seq: Sequence, watermark: int) -> bool:
        """Give a sequence a seat, its cached prefix and the promise of the other blocks its tokens
        need; False, changing nothing, when seats or blocks are short."""
        if len(self.seats.free) - self.reserved_seats < 1 + seq.num_forks:
            return False
        found = self._cached_prefix(seq, 0)
        self.pool.acquire(found)
        needed = -(-seq.num_tokens // BLOCK_SIZE) - len(found)
        if needed + watermark > self.pool.num_available:
            self.pool.release(found)
            return False
        self.pool.promised += needed
        seq.num_promised = needed
        seq.block_table = found
        seq.num_computed = len(found) * BLOCK_SIZE
        seq.num_registered = len(found)
        self.seats.take(seq)
        self.reserved_seats += seq.num_forks
        self.cached_tokens += seq.num_computed
        return True

    def stop(self, seq: Sequence) -> None:
        """Take back the seat and everything the sequence holds; its tokens stay with it."""
        if seq in self.sequences:
            self.sequences.remove(seq)
        if self.copies:
            self.copies = [c for c in self.copies if c[1] not in seq.block_table]
        self.seats.leave(seq)
        self.reserved_seats -= seq.num_forks
        self._flight.release(seq.block_table)
        self.pool.promised -= seq.num_promised
        seq.block_table = []
        seq.num_promised = seq.num_computed = seq.num_registered = seq.num_writable = 0

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Hold writable blocks for tokens [num_computed, num_tokens); False when none are left."""
        if num_tokens <= seq.num_writable:
            return True
        table = seq.block_table
        start = len(table)
        missing = max(-(-num_tokens // BLOCK_SIZE) - start, 0)
        block, offset = divmod(seq.num_computed, BLOCK_SIZE)
        shared = offset > 0 and self.pool.ref_count(table[block]) > 1
        try:
            fresh = self.bind(seq, missing + shared, promised=missing)
        except NoBlocksLeft:
            return False
        if shared:  # copy-on-write: the writer gets its own copy of the partly filled block
            copy = fresh.pop()
            self.copies.append((table[block], copy))
            self.pool.release((table[block],))
            table[block] = copy
            start = block
        table += fresh
        self.seats.write_blocks(seq, start)
        seq.num_writable = len(table) * BLOCK_SIZE
        return True

    def bind(self, seq: Sequence, count: int, *, promised: int) -> list[int]:
        """Fresh blocks, up to `promised` of them out of the sequence's promise.

        Raises NoBlocksLeft, changing nothing.
        """
        promised = min(seq.num_promised, promised)
        fresh = self.pool.allocate(count, promised=promised)
        seq.num_promised -= promised
        return fresh

    def skip_cached(self, seq: Sequence) -> int:
        """Take over blocks that others have computed since; returns the tokens that saved."""
        start = len(seq.block_table)
        if start * BLOCK_SIZE != seq.num_computed:
            return 0
        found = self._cached_prefix(seq, start)
        if not found:
            return 0
        self.pool.acquire(found)
        promised = min(seq.num_promised, len(found))
        seq.num_promised -= promised
        self.pool.promised -= promised
        seq.block_table += found
        seq.num_computed += len(found) * BLOCK_SIZE
        self.seats.write_blocks(seq, start)
        self.cached_tokens += len(found) * BLOCK_SIZE
        return len(found) * BLOCK_SIZE

    def register_blocks(self, seq: Sequence, num_done: int) -> None:
        """Make blocks findable that are filled now that `num_done` tokens have been computed;
        content that two sequences computed is kept once."""
        for i in range(seq.num_registered, num_done // BLOCK_SIZE):
            parent = seq.block_hashes[i - 1] if i else seq.hash_root
            mine = seq.block_table[i]
            known = self.pool.register(mine, seq.block_hashes[i], parent)
            if known != mine:
                self.pool.acquire((known,))
                self._flight.release((mine,))
                seq.block_table[i] = known
                self.seats.write_blocks(seq, i)
            seq.num_registered = i + 1

    def fork(self, parent: Sequence, choice: int) -> Sequence:
        """A further choice of a request whose prompt is computed: shares every block."""
        child = parent.fork(choice)
        self.pool.acquire(child.block_table)
        parent.num_forks -= 1
        self.reserved_seats -= 1
        self.seats.take(child)
        self.sequences.append(child)
        return child

    def _cached_prefix(self, seq: Sequence, start_block: int) -> list[int]:
        """Cached blocks that continue the sequence from block `start_block` on. Never the block
        of the last token: its logits are needed, so it has to be computed."""
        if not self.pool.caching or seq.state.request.params.prompt_logprobs is not None:
            return []
        last = (seq.num_tokens - 1) // BLOCK_SIZE
        return self.pool.match(seq.block_hashes[start_block:last])
