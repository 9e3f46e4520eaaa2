"""The scheduler: which tokens the next step computes, and what became of the last step's.

There are no prefill and decode phases. A sequence has `num_computed` tokens in the cache and
`num_tokens` it knows; a step moves the first towards the second within one token budget:

    1. every running sequence that lacks one token (a decode) gets it;
    2. running sequences that lack more get a chunk, oldest request first;
    3. waiting sequences are admitted, oldest first, while seats and blocks last, and get a chunk.

Admission promises a prompt all the blocks it will need, so an admitted prefill cannot get stuck
half way; decodes take blocks one by one, and when none is left the youngest running sequence is
preempted: its blocks are released (staying cached while there is room) and it waits again with all
tokens it has, to be recomputed.

Blocks are taken only for tokens that are about to be computed: at most the last block of a sequence
is partly filled.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.kv.pool import NoBlocksLeft
from quire.engine.output import Admission, ChoiceOutput
from quire.engine.request import BLOCK_SIZE, FinishReason, RequestState, Sequence
from quire.engine.scheduler.batch import Chunk, ScheduledStep, Seats, prompt_logprob_positions
from quire.engine.scheduler.logprobs import add_logprobs, take_prompt_logprobs
from quire.engine.scheduler.queue import WaitingQueue

if TYPE_CHECKING:
    from quire.engine.kv.pool import BlockPool
    from quire.engine.scheduler.plan import StepResult


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Bounds of a step and of the scheduler's memory."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_logit_rows: int
    """Rows of a step whose logits may be asked for; at least max_num_seqs."""
    vocab_size: int
    watermark_blocks: int = 0
    """Blocks that admission leaves available for the running sequences to grow into."""


@dataclass
class SchedulerCounters:
    """Totals since the start."""

    steps: int = 0
    preemptions: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    cache_hits: int = 0


class Scheduler:
    """Owns the waiting and running sequences and their blocks. Not thread-safe: one owner."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.counters = SchedulerCounters()
        self._requests: dict[str, list[Sequence]] = {}
        self._with_deadline: set[str] = set()
        max_blocks = -(-limits.max_model_len // BLOCK_SIZE)
        self._seats = Seats(limits.max_num_seqs, max_blocks, limits.vocab_size)
        self._reserved_seats = 0
        self._copies: list[tuple[int, int]] = []

    # ---- requests in and out

    def add(self, state: RequestState, sequences: list[Sequence]) -> None:
        """Queue a request: one sequence with forks to come, or one per resumed choice."""
        request = state.request
        state.open_choices = len(sequences) + sum(seq.num_forks for seq in sequences)
        self._requests[request.request_id] = sequences
        if request.deadline is not None:
            self._with_deadline.add(request.request_id)
        for seq in sequences:
            self.waiting.push(seq)

    def finish_request(self, request_id: str, reason: FinishReason) -> list[ChoiceOutput]:
        """End a request now, wherever it is; every block is released. Unknown ids are ignored."""
        outputs: list[ChoiceOutput] = []
        for seq in list(self._requests.get(request_id, ())):
            position = seq.num_output
            outputs.extend(
                ChoiceOutput(request_id, choice, position, [], finish_reason=reason)
                for choice in (seq.choice, *range(1, 1 + seq.num_forks))
            )
            self._finish(seq)
        if outputs:
            outputs[-1].last_of_request = True
        return outputs

    def has_request(self, request_id: str) -> bool:
        """The request is waiting or running."""
        return request_id in self._requests

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens not yet computed, of waiting and running sequences."""
        running = sum(s.num_tokens - s.num_computed for s in self.running if s.is_prefill)
        return self.waiting.num_tokens + running

    @property
    def has_work(self) -> bool:
        """A step would compute something."""
        return bool(self.running) or self.waiting.num_sequences > 0

    @property
    def request_ids(self) -> list[str]:
        """Requests waiting or running."""
        return list(self._requests)

    def expire(self, now: float) -> list[ChoiceOutput]:
        """End the requests whose deadline has passed."""
        outputs: list[ChoiceOutput] = []
        for request_id in list(self._with_deadline):
            deadline = self._requests[request_id][0].state.request.deadline
            if deadline is not None and deadline <= now:
                outputs += self.finish_request(request_id, FinishReason.DEADLINE)
        return outputs

    # ---- a step

    def schedule(self) -> ScheduledStep | None:
        """Choose the next step's tokens and take their blocks; None when there is nothing to do."""
        self._copies = []
        preemptions = self.counters.preemptions
        chunks: dict[Sequence, Chunk] = {}
        budget = self._schedule_decodes(chunks)
        rows = self.limits.max_logit_rows - len(chunks)
        for seq in [s for s in self.running if s not in chunks]:
            if budget <= 0:
                break
            if seq.seat < 0:
                continue  # preempted meanwhile
            budget, rows = self._schedule_chunk(seq, chunks, budget, rows)
        if self.counters.preemptions == preemptions:
            while budget > 0 and (new := self.waiting.peek()) is not None and self._admit(new):
                budget, rows = self._schedule_chunk(new, chunks, budget, rows)
        if not chunks:
            return None
        step = self.counters.steps
        return self._seats.build(step, list(chunks.values()), self._copies)

    def _schedule_decodes(self, chunks: dict[Sequence, Chunk]) -> int:
        """Give every running sequence that lacks one token that token; returns the budget left."""
        for seq in list(self.running):
            if seq.seat < 0 or seq.is_prefill:
                continue
            while not self._grow(seq, seq.num_tokens):
                victim = max(self.running, key=_age)
                self._preempt(victim)
                chunks.pop(victim, None)
                if victim is seq:
                    break
            else:
                chunks[seq] = Chunk(seq, seq.num_computed, 1)
        return self.limits.max_num_batched_tokens - len(chunks)

    def _schedule_chunk(
        self, seq: Sequence, chunks: dict[Sequence, Chunk], budget: int, rows: int
    ) -> tuple[int, int]:
        """Give a prefilling sequence a chunk; returns the budget and the logit rows left."""
        self._skip_cached(seq)
        missing = seq.num_tokens - seq.num_computed
        count = min(missing, budget)
        wanted = prompt_logprob_positions(seq, seq.num_computed, seq.num_computed + count)
        if len(wanted) >= rows:
            count = max(min(count, wanted.start - seq.num_computed + rows - 1), 0)
        if count < missing and count >= BLOCK_SIZE:
            # End on a block boundary, so that others' cached blocks can be used from there on.
            count -= (seq.num_computed + count) % BLOCK_SIZE
        if count <= 0 or not self._grow(seq, seq.num_computed + count):
            return budget, rows
        chunks[seq] = Chunk(seq, seq.num_computed, count)
        end = seq.num_computed + count
        used = len(prompt_logprob_positions(seq, seq.num_computed, end)) + (count == missing)
        return budget - count, rows - used

    def update(self, scheduled: ScheduledStep, result: StepResult) -> list[ChoiceOutput]:
        """Take in what a step computed and drew: cached blocks, new tokens, finished choices."""
        self.counters.steps += 1
        now = time.monotonic()
        for seq, start, count in scheduled.chunks:
            self.counters.computed_tokens += count
            seq.num_computed = start + count
            self._register_blocks(seq)
        take_prompt_logprobs(scheduled, result)
        # Fork before any token is appended: all choices start from the prompt.
        drawn = [
            d.seq if d.choice == d.seq.choice else self._fork(d.seq, d.choice)
            for d in scheduled.draws
        ]
        tokens = result.token_ids.tolist()
        outputs = [self._append(seq, t, now) for seq, t in zip(drawn, tokens, strict=True)]
        add_logprobs(outputs, scheduled, result)
        return self._fail_invalid(outputs, result) if result.invalid.any() else outputs

    def _fail_invalid(self, outputs: list[ChoiceOutput], result: StepResult) -> list[ChoiceOutput]:
        """End the requests of draws that had no finite logit; the others of the step go on."""
        flagged = zip(outputs, result.invalid.tolist(), strict=True)
        broken = {output.request_id for output, is_invalid in flagged if is_invalid}
        kept = [output for output in outputs if output.request_id not in broken]
        for request_id in sorted(broken):
            ended = self.finish_request(request_id, FinishReason.ERROR)
            kept += ended or [_error_output(request_id)]
        return kept

    # ---- parts of a step

    def _admit(self, seq: Sequence) -> bool:
        """Start the next waiting sequence, if seats and blocks for all its tokens are there."""
        seats = len(self.running) + self._reserved_seats + 1 + seq.num_forks
        if seats > self.limits.max_num_seqs:
            return False
        found = self._cached_prefix(seq, 0)
        self.pool.acquire(found)
        needed = -(-seq.num_tokens // BLOCK_SIZE) - len(found)
        watermark = self.limits.watermark_blocks if self.running else 0
        if needed + watermark > self.pool.num_available:
            self.pool.release(found)
            return False
        self.pool.promised += needed
        seq.num_promised = needed
        self.waiting.pop()
        self._start(seq, found)
        self._reserved_seats += seq.num_forks
        return True

    def _start(self, seq: Sequence, found: list[int]) -> None:
        """A sequence starts running on the cached blocks of its prefix."""
        seq.block_table = found
        seq.num_computed = len(found) * BLOCK_SIZE
        seq.num_registered = len(found)
        self._seats.take(seq)
        self.running.append(seq)
        self.counters.cache_queries += seq.num_tokens
        self.counters.cache_hits += seq.num_computed
        state = seq.state
        if state.first_scheduled is None:
            state.first_scheduled = time.monotonic()
            state.num_cached_tokens = min(seq.num_computed, seq.num_prompt)
            self.counters.prompt_tokens += seq.num_prompt

    def _cached_prefix(self, seq: Sequence, start_block: int) -> list[int]:
        """Cached blocks that continue the sequence from block `start_block` on. Never the block
        of the last token: its logits are needed, so it has to be computed."""
        if not self.pool.caching or seq.state.request.params.prompt_logprobs is not None:
            return []
        last = (seq.num_tokens - 1) // BLOCK_SIZE
        return self.pool.match(seq.block_hashes[start_block:last])

    def _skip_cached(self, seq: Sequence) -> None:
        """Take blocks that another sequence has computed since this one was admitted."""
        if seq.num_computed % BLOCK_SIZE:
            return
        found = self._cached_prefix(seq, len(seq.block_table))
        if not found:
            return
        self.pool.acquire(found)
        promised = min(seq.num_promised, len(found))
        seq.num_promised -= promised
        self.pool.promised -= promised
        start = len(seq.block_table)
        seq.block_table += found
        seq.num_computed += len(found) * BLOCK_SIZE
        seq.num_registered = len(seq.block_table)
        self._seats.write_blocks(seq, start)
        self.counters.cache_hits += len(found) * BLOCK_SIZE
        if seq.state.first_token is None:
            cached = seq.state.num_cached_tokens + len(found) * BLOCK_SIZE
            seq.state.num_cached_tokens = min(cached, seq.num_prompt)

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Hold writable blocks for tokens [num_computed, num_tokens); False when none are left."""
        table = seq.block_table
        missing = -(-num_tokens // BLOCK_SIZE) - len(table)
        block, offset = divmod(seq.num_computed, BLOCK_SIZE)
        shared = offset and self.pool.ref_count(table[block]) > 1
        if missing <= 0 and not shared:
            return True
        start = len(table)
        try:
            promised = min(seq.num_promised, max(missing, 0))
            fresh = self.pool.allocate(max(missing, 0) + bool(shared), promised=promised)
        except NoBlocksLeft:
            return False
        seq.num_promised -= promised
        if shared:  # copy-on-write: the writer gets its own copy of the partly filled block
            copy = fresh.pop()
            self._copies.append((table[block], copy))
            self.pool.release((table[block],))
            table[block] = copy
            start = block
        table += fresh
        self._seats.write_blocks(seq, start)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Release everything a running sequence holds and let it wait, to be recomputed."""
        self.counters.preemptions += 1
        if self._copies:
            self._copies = [c for c in self._copies if c[1] not in seq.block_table]
        self._stop_running(seq)
        self.waiting.push(seq)

    def _stop_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._seats.leave(seq)
        self._reserved_seats -= seq.num_forks
        self.pool.release(seq.block_table)
        self.pool.promised -= seq.num_promised
        seq.block_table = []
        seq.num_promised = seq.num_computed = seq.num_registered = 0

    def _register_blocks(self, seq: Sequence) -> None:
        """Make newly filled blocks findable; content that two sequences computed is kept once."""
        for i in range(seq.num_registered, seq.num_computed // BLOCK_SIZE):
            parent = seq.block_hashes[i - 1] if i else seq.hash_root
            mine = seq.block_table[i]
            known = self.pool.register(mine, seq.block_hashes[i], parent)
            if known != mine:
                self.pool.adopt(mine, known)
                seq.block_table[i] = known
                self._seats.write_blocks(seq, i)
            seq.num_registered = i + 1

    def _fork(self, parent: Sequence, choice: int) -> Sequence:
        """A further choice of a request whose prompt is computed: shares every block."""
        child = parent.fork(choice)
        self.pool.acquire(child.block_table)
        parent.num_forks -= 1
        self._reserved_seats -= 1
        self._requests[parent.state.request.request_id].append(child)
        self._seats.take(child)
        self.running.append(child)
        return child

    def _append(self, seq: Sequence, token: int, now: float) -> ChoiceOutput:
        """Add a drawn token to its sequence, and end the sequence where it must."""
        state = seq.state
        output = ChoiceOutput(state.request.request_id, seq.choice, seq.num_output, [token])
        self.counters.generated_tokens += 1
        if state.first_token is None:
            state.first_token = now
            scheduled = state.first_scheduled or now
            output.admission = Admission(
                state.num_cached_tokens, scheduled - state.arrival, now - scheduled
            )
            output.prompt_logprobs = state.prompt_logprobs
        seq.append(token)
        reason = self._finish_reason(seq, token)
        if reason is not None:
            output.finish_reason = reason
            output.stop_token_id = token if reason is FinishReason.STOP else None
            self._finish(seq)
            output.last_of_request = state.open_choices == 0
        return output

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        state = seq.state
        if token in state.stop_token_ids and seq.num_output > state.request.params.min_tokens:
            return FinishReason.STOP
        if seq.num_output >= state.max_tokens or seq.num_tokens >= self.limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(self, seq: Sequence) -> None:
        """The sequence ends: its blocks go back, the request is forgotten with its last choice."""
        seq.finished = True
        if seq.seat >= 0:
            self._stop_running(seq)
        else:
            self.waiting.discard(seq)
        request_id = seq.state.request.request_id
        sequences = self._requests[request_id]
        sequences.remove(seq)
        seq.state.open_choices = len(sequences) + sum(s.num_forks for s in sequences)
        if not sequences:
            del self._requests[request_id]
            self._with_deadline.discard(request_id)


def _error_output(request_id: str) -> ChoiceOutput:
    """For a request whose last choice ended with the very token that was invalid."""
    output = ChoiceOutput(request_id, 0, 0, [], finish_reason=FinishReason.ERROR)
    output.last_of_request = True
    return output


def _age(seq: Sequence) -> tuple[tuple[int, float], int]:
    """Larger is younger or less urgent: preempted first."""
    return (seq.state.order, seq.choice)
