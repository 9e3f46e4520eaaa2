"""Prompts that another pod computes, seen from both sides. Blocks and tokens only: no I/O here.

Decode side (`RemotePrefills`), life of a sequence:

    admitted   seat, cached prefix, promise of the rest               -> PrefillNeeded
    bind       some promised blocks become slots to write into        (a window at a time)
    deliver    leading blocks were verified: they count as computed and are registered
    complete   all of the prompt is there, first tokens came along    -> runs as any other
    fall_back  the other pod is lost: what was verified is kept, the rest is computed here

An end from outside (abort, deadline) first calls the prompt's `fence`: after it returns nobody
writes into its blocks any more, so they can be released.

Prefill side (`Exports`): a request that asks for it reports its prompt's blocks as chunks finish,
and they stay held until the other side has them, however the request ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.request import BLOCK_SIZE

if TYPE_CHECKING:
    from quire.engine.kv.pool import BlockPool
    from quire.engine.request import RemotePrompt, Sequence
    from quire.engine.scheduler.running import Running


@dataclass(frozen=True)
class PrefillNeeded:
    """An admitted prompt waits for blocks [start_block, num_blocks) from another pod."""

    request_id: str
    remote: RemotePrompt
    start_block: int
    num_blocks: int


@dataclass(frozen=True)
class BlocksReady:
    """Blocks [first_block, first_block + len(blocks)) of an exported prompt are computed."""

    request_id: str
    first_block: int
    blocks: tuple[int, ...]
    is_last: bool


class RemotePrefills:
    """Decode side: started sequences whose prompt comes from elsewhere."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._waiting: dict[str, tuple[Sequence, RemotePrompt]] = {}

    def open(self, seq: Sequence, remote: RemotePrompt) -> PrefillNeeded:
        """An admitted sequence waits for its prompt."""
        request_id = seq.state.request.request_id
        self._waiting[request_id] = (seq, remote)
        num_blocks = -(-seq.num_tokens // BLOCK_SIZE)
        return PrefillNeeded(request_id, remote, len(seq.block_table), num_blocks)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def bind(self, request_id: str, count: int) -> list[int]:
        """Turn up to `count` promised blocks into slots; empty when all are bound or the request
        is gone."""
        if request_id not in self._waiting:
            return []
        seq, _ = self._waiting[request_id]
        count = min(count, seq.num_promised)
        fresh = self._running.bind(seq, count, promised=count)
        start = len(seq.block_table)
        seq.block_table += fresh
        self._running.seats.write_blocks(seq, start)
        return fresh

    def deliver(self, request_id: str, num_blocks: int) -> None:
        """The leading `num_blocks` blocks of the sequence hold verified content."""
        if request_id not in self._waiting:
            return
        seq, _ = self._waiting[request_id]
        whole = min(num_blocks * BLOCK_SIZE, seq.num_tokens // BLOCK_SIZE * BLOCK_SIZE)
        seq.num_computed = max(seq.num_computed, whole)
        self._running.register_blocks(seq, seq.num_computed)

    def complete(self, request_id: str) -> Sequence | None:
        """Every token of the sequence is in its blocks: it runs from here on. None when gone."""
        if request_id not in self._waiting:
            return None
        seq, _ = self._waiting.pop(request_id)
        if seq.num_promised:
            raise AssertionError("complete before every block was bound")
        seq.num_computed = seq.num_tokens
        self._running.register_blocks(seq, seq.num_computed)
        self._running.sequences.append(seq)
        return seq

    def fall_back(self, request_id: str) -> None:
        """Compute here what was not delivered. Nobody writes into its blocks any more."""
        if request_id not in self._waiting:
            return
        seq, _ = self._waiting.pop(request_id)
        seq.state.is_remote = False  # preempted, it does not ask again
        keep = seq.num_computed // BLOCK_SIZE
        unverified = seq.block_table[keep:]
        self._running.pool.release(unverified)
        self._running.pool.promised += len(unverified)
        seq.num_promised += len(unverified)
        del seq.block_table[keep:]
        if seq.num_computed == seq.num_tokens:
            # The last token's logits are needed: its block is computed again, in a copy if shared.
            seq.num_computed -= 1
        self._running.sequences.append(seq)

    def end(self, request_id: str) -> None:
        """The request ends: stop writes into its blocks, which are released next."""
        if request_id in self._waiting:
            _, remote = self._waiting.pop(request_id)
            remote.fence()


class Exports:
    """Prefill side: blocks held for other pods, beyond the life of their requests."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._held: dict[str, list[int]] = {}

    def open(self, request_id: str) -> None:
        """The request's prompt will be exported."""
        self._held[request_id] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def note(self, seq: Sequence, num_done: int) -> BlocksReady | None:
        """Now `num_done` tokens have been computed: hold the blocks of the prompt that are new and
        complete."""
        held = self._held[seq.state.request.request_id]
        is_last = num_done >= seq.num_prompt
        end = -(-seq.num_prompt // BLOCK_SIZE) if is_last else num_done // BLOCK_SIZE
        new = seq.block_table[len(held) : end]
        if not new:
            return None
        self._pool.acquire(new)
        first = len(held)
        held += new
        return BlocksReady(seq.state.request.request_id, first, tuple(new), is_last)

    def release(self, request_id: str) -> None:
        """The other side has the blocks, or wants them no more. Unknown ids are ignored."""
        self._pool.release(self._held.pop(request_id, []))
