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

The next step may be planned while one is under way: a decode goes on from the token that one draws,
whatever it will be. Where the plan depends on what it will be, `schedule` waits (`_must_land`). A
sequence that turns out to have ended was computed for nothing in the step under way; what that drew
for it is dropped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.output import ChoiceOutput
from quire.engine.request import BLOCK_SIZE, FinishReason, RequestState, Sequence
from quire.engine.scheduler.admission import admission
from quire.engine.scheduler.batch import Chunk, ScheduledStep, Seats, prompt_logprob_positions
from quire.engine.scheduler.flight import Flight
from quire.engine.scheduler.handover import Handover
from quire.engine.scheduler.limits import SchedulerCounters, SchedulerLimits
from quire.engine.scheduler.logprobs import add_logprobs, take_prompt_logprobs
from quire.engine.scheduler.queue import WaitingQueue
from quire.engine.scheduler.remote import BlocksReady, Exports, PrefillNeeded, RemotePrefills
from quire.engine.scheduler.running import Running

if TYPE_CHECKING:
    from quire.engine.kv.pool import BlockPool
    from quire.engine.output import TokenLogprob
    from quire.engine.scheduler.plan import StepResult


@dataclass(frozen=True)
class DrawnToken:
    """A first token that another pod drew."""

    token_id: int
    logprob: TokenLogprob | None = None


class Scheduler:
    """Owns the waiting and running sequences and their blocks. Not thread-safe: one owner."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting = WaitingQueue()
        max_blocks = -(-limits.max_model_len // BLOCK_SIZE)
        seats = Seats(limits.max_num_seqs, max_blocks, limits.vocab_size)
        self.flight = Flight(pool)
        self.running = Running(pool, seats, self.flight)
        self.remote = RemotePrefills(self.running)
        self.exports = Exports(pool)
        self.handover = Handover(pool, limits.watermark_blocks)
        self.counters = SchedulerCounters()
        self.prefill_needed: list[PrefillNeeded] = []
        """Admitted since last looked at: prompts that wait for another pod."""
        self.blocks_ready: list[BlocksReady] = []
        """Computed since last looked at: blocks that another pod waits for."""
        self._requests: dict[str, list[Sequence]] = {}
        self._with_deadline: set[str] = set()

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

    def finish_request(
        self, request_id: str, reason: FinishReason, choice: int | None = None
    ) -> list[ChoiceOutput]:
        """End a request, or one choice of it, wherever it is; what it holds is released.

        Unknown ids are ignored, as is one choice of a request that has not forked yet.
        """
        outputs: list[ChoiceOutput] = []
        for seq in list(self._requests.get(request_id, ())):
            if choice is not None and (seq.choice != choice or seq.num_forks):
                continue
            position = seq.num_output
            outputs.extend(
                ChoiceOutput(request_id, ended, position, [], finish_reason=reason)
                for ended in (seq.choice, *range(1, 1 + seq.num_forks))
            )
            self._finish(seq)
        if outputs and request_id not in self._requests:
            outputs[-1].last_of_request = True
        return outputs

    def park(self, request_id: str, key: str) -> None:
        """Hold the full blocks of a request that is about to end here, for where it goes on."""
        for seq in self._requests.get(request_id, ()):
            self.handover.park(key, seq.block_table[: seq.num_registered])

    def has_request(self, request_id: str) -> bool:
        """The request is waiting or running."""
        return request_id in self._requests

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens not yet computed, of waiting and running sequences."""
        prefills = (s for s in self.running.sequences if s.is_prefill)
        running = sum(s.num_planned - s.num_computed for s in prefills)
        return self.waiting.num_tokens + running

    @property
    def has_work(self) -> bool:
        """A step would compute something, or one is under way."""
        return bool(self.running.sequences or self.flight or self.waiting.num_sequences)

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
        """Choose the next step's tokens and take their blocks; None when there is nothing to do, or
        nothing before the step under way lands. What is returned has to be run, in this order, and
        to come to `update`."""
        if self._must_land():
            return None
        self.running.copies = []
        preemptions = self.counters.preemptions
        decodes, prefills = self._schedule_decodes()
        chunks: list[Chunk] = []
        budget = self.limits.max_num_batched_tokens - len(decodes)
        rows = self.limits.max_logit_rows - len(decodes)
        for seq in prefills:
            if budget <= 0:
                break
            budget, rows = self._schedule_chunk(seq, chunks, budget, rows)
        if self.counters.preemptions == preemptions:
            while budget > 0 and (new := self._admit()) is not None:
                if new in self.running.sequences:
                    budget, rows = self._schedule_chunk(new, chunks, budget, rows)
        if not decodes and not chunks:
            return None
        step = self.counters.steps + len(self.flight)
        scheduled = self.running.seats.build(step, decodes, chunks, self.running.copies)
        self._begin(scheduled, decodes)
        return scheduled

    def _must_land(self) -> bool:
        """The next plan depends on the results of the step under way: on its tokens, or, when the
        blocks might not do for every sequence to go on, on who ends with it."""
        newest = self.flight.newest
        if newest is None:
            return False
        return newest.decides_next or self.pool.num_available < len(self.running.sequences)

    def _begin(self, scheduled: ScheduledStep, decodes: list[Sequence]) -> None:
        """Count as computed what the step will compute, and as pending what it will draw."""
        for seq in decodes:
            seq.num_computed += 1
        for seq, start, count in scheduled.chunks:
            seq.num_computed = start + count
        for i, seq in enumerate(scheduled.draws):
            seq.num_pending += 1
            seq.draw = i
        self.flight.begin(scheduled)

    def _schedule_decodes(self) -> tuple[list[Sequence], list[Sequence]]:
        """The running sequences that lack one token, each with a place for it; and those that lack
        more."""
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for seq in list(self.running.sequences):
            num_planned = len(seq.tokens) + seq.num_pending
            if seq.seat < 0 or (seq.num_pending and seq.is_ending):
                continue  # preempted just now, or the token that is pending is its last
            if num_planned - seq.num_computed > 1:
                prefills.append(seq)
            elif num_planned <= seq.num_writable or self._make_room(seq, decodes):
                decodes.append(seq)
        return decodes, [seq for seq in prefills if seq.seat >= 0]

    def _make_room(self, seq: Sequence, decodes: list[Sequence]) -> bool:
        """Hold a block for a sequence's next token, preempting the youngest ones until there is
        one; False when that came to be the sequence itself."""
        while not self.running.grow(seq, seq.num_planned):
            victim = max(self.running.sequences, key=_age)
            self._preempt(victim)
            if victim in decodes:
                decodes.remove(victim)
            if victim is seq:
                return False
        return True

    def _schedule_chunk(
        self, seq: Sequence, chunks: list[Chunk], budget: int, rows: int
    ) -> tuple[int, int]:
        """Give a prefilling sequence a chunk; returns the budget and the logit rows left."""
        self._count_cached(seq, self.running.skip_cached(seq))
        missing = seq.num_planned - seq.num_computed
        count = min(missing, budget)
        wanted = prompt_logprob_positions(seq, seq.num_computed, seq.num_computed + count)
        if len(wanted) >= rows:
            count = max(min(count, wanted.start - seq.num_computed + rows - 1), 0)
        if count < missing and count >= BLOCK_SIZE:
            # End on a block boundary, so that others' cached blocks can be used from there on.
            count -= (seq.num_computed + count) % BLOCK_SIZE
        if count <= 0 or not self.running.grow(seq, seq.num_computed + count):
            return budget, rows
        chunks.append(Chunk(seq, seq.num_computed, count))
        end = seq.num_computed + count
        used = len(prompt_logprob_positions(seq, seq.num_computed, end)) + (count == missing)
        return budget - count, rows - used

    def update(self, scheduled: ScheduledStep, result: StepResult) -> list[ChoiceOutput]:
        """Take in what the oldest step under way computed and drew: cached blocks, new tokens,
        finished choices. What has ended meanwhile is passed over."""
        self.flight.land(scheduled)
        self.counters.steps += 1
        self.counters.computed_tokens += scheduled.plan.num_tokens
        for seq, num_done in scheduled.filled:
            if not seq.finished:
                self._note_computed(seq, num_done)
        take_prompt_logprobs(scheduled, result)
        drawn = scheduled.draws
        if scheduled.forks:  # before any token is appended: all choices start from the prompt
            drawn = drawn + [self._fork(*fork) for fork in scheduled.forks]
        now = time.monotonic()
        tokens = result.token_ids.tolist()
        outputs = {
            i: self._append(seq, token, now)
            for i, (seq, token) in enumerate(zip(drawn, tokens, strict=True))
            if not seq.finished
        }
        self.counters.generated_tokens += len(outputs)
        add_logprobs(outputs, drawn, scheduled.plan, result)
        if any(result.invalid.tolist()):
            return self._fail_invalid(outputs, result)
        return list(outputs.values())

    def _note_computed(self, seq: Sequence, num_done: int) -> None:
        """The first `num_done` tokens are in the cache: others may find and fetch their blocks."""
        self.running.register_blocks(seq, num_done)
        if seq.state.request.request_id in self.exports:
            ready = self.exports.note(seq, num_done)
            self.blocks_ready += [ready] if ready is not None else []

    def complete_remote(self, request_id: str, drawn: list[DrawnToken]) -> list[ChoiceOutput]:
        """The prompt's blocks are all in place, and its first tokens were drawn elsewhere, one per
        choice: the request goes on from there. Unknown ids are ignored."""
        seq = self.remote.complete(request_id)
        if seq is None:
            return []
        now = time.monotonic()
        seq.num_pending = 1  # it was drawn elsewhere
        forks = [self._fork(seq, choice) for choice in range(1, 1 + seq.num_forks)]
        outputs = []
        for choice, token in zip([seq, *forks], drawn, strict=True):
            output = self._append(choice, token.token_id, now)
            output.logprobs = [] if token.logprob is None else [token.logprob]
            outputs.append(output)
        self.counters.generated_tokens += len(outputs)
        return outputs

    def _fail_invalid(
        self, outputs: dict[int, ChoiceOutput], result: StepResult
    ) -> list[ChoiceOutput]:
        """End the requests of draws that had no finite logit; the others of the step go on."""
        broken = {output.request_id for i, output in outputs.items() if result.invalid[i]}
        kept = [output for output in outputs.values() if output.request_id not in broken]
        for request_id in sorted(broken):
            ended = self.finish_request(request_id, FinishReason.ERROR)
            kept += ended or [_error_output(request_id)]
        return kept

    # ---- parts of a step

    def _admit(self) -> Sequence | None:
        """Start the next waiting sequence, if seats and blocks for all its tokens are there."""
        seq = self.waiting.peek()
        watermark = self.limits.watermark_blocks if self.running.sequences else 0
        if seq is None or not self.running.admit(seq, watermark):
            return None
        self.waiting.pop()
        self.counters.cache_queries += seq.num_tokens
        state = seq.state
        if state.first_scheduled is None:
            state.first_scheduled = time.monotonic()
            self.counters.prompt_tokens += seq.num_prompt
        self._count_cached(seq, seq.num_computed)
        remote = state.request.remote
        if remote is not None and state.is_remote and seq.num_output == 0:
            self.prefill_needed.append(self.remote.open(seq, remote))
        else:
            self.running.sequences.append(seq)
        return seq

    def _count_cached(self, seq: Sequence, num_tokens: int) -> None:
        """Tokens of a sequence were found in the prefix cache."""
        self.counters.cache_hits += num_tokens
        if seq.state.first_token is None:
            cached = seq.state.num_cached_tokens + num_tokens
            seq.state.num_cached_tokens = min(cached, seq.num_prompt)

    def _preempt(self, seq: Sequence) -> None:
        """Release everything a running sequence holds and let it wait, to be recomputed."""
        self.counters.preemptions += 1
        self.running.stop(seq)
        self.waiting.push(seq)

    def _fork(self, parent: Sequence, choice: int) -> Sequence:
        """A further choice; of a request that has ended, the one it would have been a fork of."""
        if parent.finished:
            return parent
        child = self.running.fork(parent, choice)
        self._requests[parent.state.request.request_id].append(child)
        return child

    def _append(self, seq: Sequence, token: int, now: float) -> ChoiceOutput:
        """Add a token that was pending to its sequence, and end the sequence where it must."""
        position = len(seq.tokens) - seq.num_prompt
        output = ChoiceOutput(seq.request_id, seq.choice, position, [token])
        if seq.is_new:
            seq.is_new = False
            _note_first(seq.state, output, now)
        seq.num_pending -= 1
        seq.append(token)
        if token in seq.stop_token_ids and position >= seq.state.request.params.min_tokens:
            output.finish_reason, output.stop_token_id = FinishReason.STOP, token
        elif len(seq.tokens) >= seq.max_len:
            output.finish_reason = FinishReason.LENGTH
        else:
            return output
        self._finish(seq)
        output.last_of_request = seq.state.open_choices == 0
        return output

    def _finish(self, seq: Sequence) -> None:
        """The sequence ends: its blocks go back, the request is forgotten with its last choice."""
        seq.finished = True
        if seq.seat >= 0:
            self.remote.end(seq.state.request.request_id)
            self.running.stop(seq)
        else:
            self.waiting.discard(seq)
        request_id = seq.state.request.request_id
        sequences = self._requests[request_id]
        sequences.remove(seq)
        seq.state.open_choices = len(sequences) + sum(s.num_forks for s in sequences)
        if not sequences:
            del self._requests[request_id]
            self._with_deadline.discard(request_id)


def _note_first(state: RequestState, output: ChoiceOutput, now: float) -> None:
    """A choice's first output here: the request's first one tells of its prompt."""
    if state.first_token is None:
        state.first_token = now
        output.admission = admission(state)
        output.prompt_logprobs = state.prompt_logprobs


def _error_output(request_id: str) -> ChoiceOutput:
    """For a request whose last choice ended with the very token that was invalid."""
    output = ChoiceOutput(request_id, 0, 0, [], finish_reason=FinishReason.ERROR)
    output.last_of_request = True
    return output


def _age(seq: Sequence) -> tuple[tuple[int, float], int]:
    """Larger is younger or less urgent: preempted first."""
    return (seq.state.order, seq.choice)
