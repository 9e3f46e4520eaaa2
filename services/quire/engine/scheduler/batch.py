"""Turns what a step computes into the flat arrays of a `StepPlan`.

What does not change while a sequence runs (the rule of its draws, most of its block table) is
written once into per-seat rows when it starts running; a step gathers the rows of its sequences.

    sequences   [decodes: one token each)[chunks of prompts, and of what is computed again)
    draws       [decodes)[chunks that reach the newest token)[choices to fork off)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quire.engine.request import BLOCK_SIZE
from quire.engine.scheduler.edits import build_edits, needs_edits
from quire.engine.scheduler.plan import StepPlan
from quire.kernels.ops import StepInputs, drawn_as
from quire.kernels.sampling import DRAW_RULE, SamplingBatch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.api.sampling import SamplingParams
    from quire.engine.request import Sequence


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence, computed in one step."""

    seq: Sequence
    start: int
    num_tokens: int


class ScheduledStep(NamedTuple):
    """A plan and what the scheduler needs to take in its result."""

    plan: StepPlan
    num_decodes: int
    """Leading sequences of the plan that compute the one token they lack."""
    chunks: list[Chunk]
    """Of the sequences after those."""
    draws: list[Sequence]
    """Whose tokens are drawn, in the order of the plan's draws, which end with `forks`."""
    forks: list[tuple[Sequence, int]]
    """(sequence, choice to fork off it) of the other draws."""
    filled: list[tuple[Sequence, int]]
    """(sequence, its tokens in the cache once the step has run), where a block or the prompt may
    have become complete."""
    prompt_logprobs: list[tuple[Sequence, int]]
    """(sequence, how many of the plan's prompt rows are its), in row order."""
    decides_next: bool
    """The next step cannot be planned before this one's tokens are known: choices fork off with
    them, or a sequence draws by its history."""
    is_plain: bool
    """Nothing but decodes whose sequences are plain: see `Seats._go_on`."""


_NO_COPIES = np.empty((0, 2), np.int32)
_NO_ROWS = np.empty(0, np.int32)


class Seats:
    """Per-seat rows of the running sequences, one seat per sequence."""

    def __init__(self, max_num_seqs: int, max_blocks: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.free = list(range(max_num_seqs - 1, -1, -1))
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.rules = np.zeros(max_num_seqs, DRAW_RULE)
        self._last: ScheduledStep | None = None
        self._moved = False
        """Since that step was built a block table has changed."""

    def take(self, seq: Sequence) -> None:
        """Give the sequence a seat and write its rows."""
        seat = seq.seat = self.free.pop()
        params, seed = seq.state.request.params, seq.state.request.seed
        temperature = 0.0 if params.is_greedy else params.temperature
        filters = (params.top_k, params.top_p, params.min_p)
        self.rules[seat] = (temperature, *filters, seed & (2**64 - 1), seq.choice)
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
            self._moved = True

    def gather_blocks(self, sequences: list[Sequence]) -> np.ndarray:
        """The block tables of sequences, as wide as the longest: [sequences, blocks]."""
        seats = np.array([seq.seat for seq in sequences], np.intp)
        return self.block_tables[seats, : max([len(seq.block_table) for seq in sequences])]

    def build(
        self, step: int, decodes: list[Sequence], chunks: list[Chunk], copies: list[tuple[int, int]]
    ) -> ScheduledStep:
        """The plan of a step over `decodes` and then `chunks`, of sequences that all have seats and
        blocks."""
        last = self._last
        if last is not None and last.is_plain and not chunks and decodes == last.draws:
            scheduled = self._go_on(last, step, decodes, copies)
        else:
            scheduled = _Builder(self, decodes, chunks).build(step, copies)
        self._last, self._moved = scheduled, False
        return scheduled

    def _go_on(
        self, last: ScheduledStep, step: int, decodes: list[Sequence], copies: list[tuple[int, int]]
    ) -> ScheduledStep:
        """The plan of a step like the last, where each sequence is one token further: what the
        builder would give, with less code, which behind a model's step comes from memory: numpy's
        for one operation on arrays takes 20 us, a list of 32 numbers 3."""
        before, sampling = last.plan.inputs, last.plan.sampling
        ends = [seq.num_computed + 1 for seq in decodes]
        context_lens = np.array(ends, np.int32)
        inputs = StepInputs(
            token_ids=np.array(_newest(decodes), np.int32),
            positions=before.context_lens,
            query_start=before.query_start,
            context_lens=context_lens,
            block_tables=self.gather_blocks(decodes) if self._moved else before.block_tables,
            logit_rows=before.logit_rows,
        )
        plan = StepPlan(
            step=step,
            inputs=inputs,
            sampling=SamplingBatch(sampling.rows, sampling.rules, context_lens.view(np.uint32)),
            copies=_pairs(copies),
            logprob_draws=_NO_ROWS,
            num_logprobs=0,
            prompt_rows=_NO_ROWS,
            prompt_targets=_NO_ROWS,
            num_prompt_logprobs=0,
        )
        pairs = zip(decodes, ends, strict=True)
        filled = [(seq, end) for seq, end in pairs if end % BLOCK_SIZE == 0]
        return last._replace(plan=plan, draws=decodes, filled=filled)


class _Builder:
    """The rows of one step: first those of its decodes, which are alike, then chunk by chunk."""

    def __init__(self, seats: Seats, decodes: list[Sequence], chunks: list[Chunk]) -> None:
        self.seats = seats
        self.decodes = decodes
        self.chunks = chunks
        self.draws = decodes.copy()
        self.logit_rows = list(range(len(decodes)))
        """Rows of the step whose logits are wanted."""
        self.draw_rows = self.logit_rows.copy()
        """The logit row of each draw."""
        self.prompt: list[tuple[Sequence, range]] = []
        """Prompt positions whose log-probabilities are wanted."""
        self.prompt_rows: list[int] = []
        """The logit row of each of those."""
        self.forks: list[tuple[Sequence, int]] = []

    def build(self, step: int, copies: list[tuple[int, int]]) -> ScheduledStep:
        """The plan and what goes with it."""
        inputs = self._inputs()
        special = [i for i, seq in enumerate(self.draws) if not seq.is_plain]
        drawn = self.draws
        if special:
            special += self._add_forks(special)
            drawn = drawn + [seq for seq, _ in self.forks]
        wanted = [i for i in special if _params(drawn[i]).logprobs is not None]
        targets = [t for seq, at in self.prompt for t in seq.tokens[at.start + 1 : at.stop + 1]]
        plan = StepPlan(
            step=step,
            inputs=inputs,
            sampling=self._sampling(drawn, edited=any(needs_edits(drawn[i]) for i in special)),
            copies=_pairs(copies),
            logprob_draws=_rows(wanted),
            num_logprobs=_most(_params(drawn[i]).logprobs for i in wanted),
            prompt_rows=_rows(self.prompt_rows),
            prompt_targets=_rows(targets),
            num_prompt_logprobs=_most(_params(seq).prompt_logprobs for seq, _ in self.prompt),
        )
        is_plain = not special and not self.chunks
        decides_next = bool(self.forks) or any(drawn[i].state.draws_by_history for i in special)
        return ScheduledStep(
            plan=plan,
            num_decodes=len(self.decodes),
            chunks=self.chunks,
            draws=self.draws,
            forks=self.forks,
            filled=self._filled(),
            prompt_logprobs=[(seq, len(positions)) for seq, positions in self.prompt],
            decides_next=decides_next,
            is_plain=is_plain,
        )

    def _inputs(self) -> StepInputs:
        decodes = self.decodes
        positions = [seq.num_computed for seq in decodes]
        token_ids = _newest(decodes)
        context_lens = [position + 1 for position in positions]
        query_start = list(range(len(decodes) + 1))
        for seq, start, num_tokens in self.chunks:
            end = start + num_tokens
            self._add_logit_rows(seq, start, end, first_row=len(token_ids) - start)
            token_ids += seq.tokens[start:end]
            positions += range(start, end)
            query_start.append(len(token_ids))
            context_lens.append(end)
        sequences = [*decodes, *(chunk.seq for chunk in self.chunks)] if self.chunks else decodes
        return StepInputs(
            token_ids=np.array(token_ids, np.int32),
            positions=np.array(positions, np.int32),
            query_start=np.array(query_start, np.int32),
            context_lens=np.array(context_lens, np.int32),
            block_tables=self.seats.gather_blocks(sequences),
            logit_rows=np.array(self.logit_rows, np.int32),
        )

    def _add_logit_rows(self, seq: Sequence, start: int, end: int, first_row: int) -> None:
        """Of a chunk; position p is row `first_row` + p."""
        rows = self.logit_rows
        if positions := prompt_logprob_positions(seq, start, end):
            self.prompt.append((seq, positions))
            self.prompt_rows += range(len(rows), len(rows) + len(positions))
            rows += [first_row + p for p in positions]
        if end == seq.num_planned:
            self.draws.append(seq)
            self.draw_rows.append(len(rows))
            rows.append(first_row + end - 1)

    def _add_forks(self, special: list[int]) -> range:
        """Draws for the choices to fork off, from the row of the first choice each; their numbers
        follow those of the others."""
        for i in special:
            seq = self.draws[i]
            self.forks += [(seq, choice) for choice in range(1, 1 + seq.num_forks)]
            self.draw_rows += [self.draw_rows[i]] * seq.num_forks
        return range(len(self.draws), len(self.draw_rows))

    def _sampling(self, drawn: list[Sequence], *, edited: bool) -> SamplingBatch:
        rules = self.seats.rules.take([seq.seat for seq in drawn])
        if self.forks:
            rules["choice"][len(self.draws) :] = [choice for _, choice in self.forks]
        return SamplingBatch(
            rows=_rows(self.draw_rows),
            rules=rules,
            position=np.array([len(seq.tokens) + seq.num_pending for seq in drawn], np.uint32),
            edits=build_edits(drawn, self.seats.vocab_size) if edited else None,
        )

    def _filled(self) -> list[tuple[Sequence, int]]:
        filled = [(seq, start + num_tokens) for seq, start, num_tokens in self.chunks]
        for seq in self.decodes:
            end = seq.num_computed + 1
            if end % BLOCK_SIZE == 0 or end == seq.num_prompt:
                filled.append((seq, end))
        return filled


def _params(seq: Sequence) -> SamplingParams:
    return seq.state.request.params


def _newest(decodes: list[Sequence]) -> list[int]:
    """The token that each decode computes, or which draw of the step under way it is."""
    return [drawn_as(seq.draw) if seq.num_pending else seq.tokens[-1] for seq in decodes]


def _pairs(copies: list[tuple[int, int]]) -> np.ndarray:
    return np.array(copies, np.int32) if copies else _NO_COPIES


def _rows(rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32) if rows else _NO_ROWS


def _most(wanted: Iterable[int | None]) -> int:
    """The largest number of log-probabilities wanted."""
    return max((count or 0 for count in wanted), default=0)


def prompt_logprob_positions(seq: Sequence, start: int, end: int) -> range:
    """Positions in [start, end) whose logits score the next prompt token and are still wanted."""
    if seq.state.request.params.prompt_logprobs is None:
        return range(0)
    return range(max(start, len(seq.state.prompt_logprobs)), min(end, seq.num_prompt - 1))
