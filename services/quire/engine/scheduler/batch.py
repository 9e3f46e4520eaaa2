"""Turns a step's chunks into the flat arrays of a `StepPlan`.

What does not change while a sequence runs (sampling parameters, most of its block table) is written
once into per-seat rows when it starts running; a step gathers the rows of its sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quire.engine.scheduler.edits import build_edits, needs_edits
from quire.engine.scheduler.plan import StepPlan
from quire.kernels.ops import StepInputs, drawn_as
from quire.kernels.sampling import SamplingBatch

if TYPE_CHECKING:
    from quire.engine.request import Sequence


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence, computed in one step."""

    seq: Sequence
    start: int
    num_tokens: int


class Draw(NamedTuple):
    """One token to draw: for `choice` of the sequence's request (its own, or one to fork off)."""

    seq: Sequence
    choice: int


@dataclass(frozen=True)
class ScheduledStep:
    """A plan and what the scheduler needs to take in its result."""

    plan: StepPlan
    chunks: list[Chunk]
    draws: list[Draw]
    prompt_logprobs: list[tuple[Sequence, int]]
    """(sequence, how many of the plan's prompt rows are its), in row order."""
    decides_next: bool
    """The next step cannot be planned before this one's tokens are known: choices fork off with
    them, or a sequence draws by its history."""


_NO_COPIES = np.empty((0, 2), np.int32)
_NO_ROWS = np.empty(0, np.int32)


class Seats:
    """Per-seat rows of the running sequences, one seat per sequence."""

    def __init__(self, max_num_seqs: int, max_blocks: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.free = list(range(max_num_seqs - 1, -1, -1))
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int32)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.uint64)

    def take(self, seq: Sequence) -> None:
        """Give the sequence a seat and write its rows."""
        seat = seq.seat = self.free.pop()
        params = seq.state.request.params
        self.temperature[seat] = 0.0 if params.is_greedy else params.temperature
        self.top_k[seat] = params.top_k
        self.top_p[seat] = params.top_p
        self.min_p[seat] = params.min_p
        self.seed[seat] = seq.state.request.seed & (2**64 - 1)
        self.write_blocks(seq, 0)

    def leave(self, seq: Sequence) -> None:
        """The sequence no longer runs."""
        self.free.append(seq.seat)
        seq.seat = -1

    def write_blocks(self, seq: Sequence, start: int) -> None:
        """Entries [start, end) of the sequence's block table changed."""
        table = seq.block_table
        if start < len(table):
            self.block_tables[seq.seat, start : len(table)] = table[start:]

    def build(self, step: int, chunks: list[Chunk], copies: list[tuple[int, int]]) -> ScheduledStep:
        """The plan of a step over `chunks`, whose sequences all have seats and blocks."""
        builder = _Builder(self, chunks)
        logit_rows, draws, draw_rows, prompt = builder.rows()
        inputs = builder.inputs(np.array(logit_rows, np.int32))
        targets = [t for seq, rows in prompt for t in seq.tokens[rows.start + 1 : rows.stop + 1]]
        wanted = [i for i, d in enumerate(draws) if d.seq.state.request.params.logprobs is not None]
        plan = StepPlan(
            step=step,
            inputs=inputs,
            sampling=self._sampling(draws, draw_rows),
            copies=np.array(copies, np.int32) if copies else _NO_COPIES,
            logprob_draws=np.array(wanted, np.int32) if wanted else _NO_ROWS,
            num_logprobs=max((_logprobs(draws[i].seq) for i in wanted), default=0),
            prompt_rows=np.array(builder.prompt_rows, np.int32) if prompt else _NO_ROWS,
            prompt_targets=np.array(targets, np.int32) if prompt else _NO_ROWS,
            num_prompt_logprobs=max((_prompt_logprobs(seq) for seq, _ in prompt), default=0),
        )
        owners = [(seq, len(rows)) for seq, rows in prompt]
        decides_next = any(d.seq.num_forks or d.seq.state.draws_by_history for d in draws)
        return ScheduledStep(plan, chunks, draws, owners, decides_next)

    def _sampling(self, draws: list[Draw], rows: list[int]) -> SamplingBatch:
        seats = np.array([d.seq.seat for d in draws], np.intp)
        return SamplingBatch(
            rows=np.array(rows, np.int32),
            temperature=self.temperature[seats],
            top_k=self.top_k[seats],
            top_p=self.top_p[seats],
            min_p=self.min_p[seats],
            seed=self.seed[seats],
            choice=np.array([d.choice for d in draws], np.uint32),
            position=np.array([d.seq.num_planned for d in draws], np.uint32),
            edits=build_edits([d.seq for d in draws], self.vocab_size)
            if any(needs_edits(d.seq) for d in draws)
            else None,
        )


class _Builder:
    """One pass over the chunks of a step."""

    def __init__(self, seats: Seats, chunks: list[Chunk]) -> None:
        self.seats = seats
        self.chunks = chunks
        self.prompt_rows: list[int] = []

    def rows(self) -> tuple[list[int], list[Draw], list[int], list[tuple[Sequence, range]]]:
        """Rows of the step whose logits are wanted; the draws, and the logit row of each; the
        prompt positions whose log-probabilities are wanted, per sequence."""
        logit_rows: list[int] = []
        draws: list[Draw] = []
        draw_rows: list[int] = []
        prompt: list[tuple[Sequence, range]] = []
        first_row = 0
        for seq, start, num_tokens in self.chunks:
            end = start + num_tokens
            positions = prompt_logprob_positions(seq, start, end)
            if positions:
                prompt.append((seq, positions))
                self.prompt_rows.extend(range(len(logit_rows), len(logit_rows) + len(positions)))
                logit_rows.extend(first_row + p - start for p in positions)
            if end == seq.num_planned:
                draw_rows.extend([len(logit_rows)] * (1 + seq.num_forks))
                draws.append(Draw(seq, seq.choice))
                draws.extend(Draw(seq, c) for c in range(1, 1 + seq.num_forks))
                logit_rows.append(first_row + num_tokens - 1)
            first_row += num_tokens
        return logit_rows, draws, draw_rows, prompt

    def inputs(self, logit_rows: np.ndarray) -> StepInputs:
        token_ids: list[int] = []
        positions: list[int] = []
        query_start = [0]
        context_lens: list[int] = []
        for seq, start, num_tokens in self.chunks:
            end = start + num_tokens
            if num_tokens == 1:
                is_known = start < len(seq.tokens)
                token_ids.append(seq.tokens[start] if is_known else drawn_as(seq.draw))
                positions.append(start)
            else:
                token_ids.extend(seq.tokens[start:end])
                positions.extend(range(start, end))
            query_start.append(len(token_ids))
            context_lens.append(end)
        seats = np.array([c.seq.seat for c in self.chunks], np.intp)
        num_blocks = max(len(c.seq.block_table) for c in self.chunks)
        return StepInputs(
            token_ids=np.array(token_ids, np.int32),
            positions=np.array(positions, np.int32),
            query_start=np.array(query_start, np.int32),
            context_lens=np.array(context_lens, np.int32),
            block_tables=self.seats.block_tables[seats, :num_blocks],
            logit_rows=logit_rows,
        )


def prompt_logprob_positions(seq: Sequence, start: int, end: int) -> range:
    """Positions in [start, end) whose logits score the next prompt token and are still wanted."""
    if seq.state.request.params.prompt_logprobs is None:
        return range(0)
    return range(max(start, len(seq.state.prompt_logprobs)), min(end, seq.num_prompt - 1))


def _logprobs(seq: Sequence) -> int:
    return seq.state.request.params.logprobs or 0


def _prompt_logprobs(seq: Sequence) -> int:
    return seq.state.request.params.prompt_logprobs or 0
