"""Blocks of a torch pool to and from pinned host memory: what KV transfer needs of a device.

    copy_out   pool -- gather --> bounce on the device -- one copy per run of places --> places
    copy_in    places -- one copy per run of places --> bounce on the device -- scatter --> pool

Each direction has a CUDA stream and a thread of its own and returns when its copies are complete.
Neither waits for the stream that steps run on, nor does a step wait for them, because at no time do
both have a block:

    copied out   the step that wrote the block was complete (`ModelRunner.launch`) before the block
                 was offered, and no step writes it until it is released
    copied in    the step that used the block last was complete before the block was granted
                 (`scheduler.flight`), and blocks being received belong to nobody's step: no block
                 table names them until they are delivered, which is told after `copy_in` has
                 returned

so that the order is one of events seen by the host, on every rank (see `parallel.kv`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORD = torch.int64
BOUNCE_BYTES = 32 << 20
"""Device memory per direction; more blocks than fit are copied in turns."""


class PoolCopies:
    """See the module and `quire.transfer.staging.BlockCopies`. The pool is [blocks, ...].

    Raises ValueError when not two places fit `staging_bytes`, OSError when so much host memory
    cannot be pinned.
    """

    def __init__(self, pool: torch.Tensor, staging_bytes: int) -> None:
        self._pool = pool.flatten(1).view(WORD)
        self.num_blocks, words = self._pool.shape
        self.block_bytes = words * WORD.itemsize
        num_places = staging_bytes // self.block_bytes
        if num_places < 2:
            raise ValueError(
                f"kv_staging_bytes={staging_bytes} holds no block of {self.block_bytes} bytes for "
                f"each direction: give at least {2 * self.block_bytes}"
            )
        try:
            # not in the context of another rank's device
            with torch.cuda.device_of(pool):  # type: ignore[no-untyped-call]
                # [places, words]
                self._places = torch.empty((num_places, words), dtype=WORD, pin_memory=pool.is_cuda)
        except RuntimeError as error:
            raise OSError(f"kv_staging_bytes={staging_bytes} cannot be pinned: {error}") from error
        self.places: Any = self._places.view(torch.uint8).numpy()
        rows = min(max(BOUNCE_BYTES // self.block_bytes, 1), num_places)
        self._out, self._in = _Way.on(self._pool, rows), _Way.on(self._pool, rows)

    def copy_out(self, slots: Sequence[int], places: Sequence[int]) -> None:
        """From blocks of the pool to places."""
        with self._out.turns(slots, places) as turns:
            for turn in turns:
                torch.index_select(self._pool, 0, turn.index, out=turn.rows)
                for first, place, count in _runs(turn.places):
                    self._places[place : place + count].copy_(
                        turn.rows[first : first + count], non_blocking=True
                    )

    def copy_in(self, slots: Sequence[int], places: Sequence[int]) -> None:
        """From places to blocks of the pool."""
        with self._in.turns(slots, places) as turns:
            for turn in turns:
                for first, place, count in _runs(turn.places):
                    turn.rows[first : first + count].copy_(
                        self._places[place : place + count], non_blocking=True
                    )
                self._pool.index_copy_(0, turn.index, turn.rows)


@dataclass(frozen=True)
class _Turn:
    """As many blocks as fit the bounce."""

    index: torch.Tensor
    """Of the pool, [N] int64 on the device."""
    rows: torch.Tensor
    """[N, words] of the bounce."""
    places: Sequence[int]


@dataclass(frozen=True)
class _Way:
    """One direction's stream, and memory on the device between gather or scatter and the copies."""

    bounce: torch.Tensor
    stream: Any = None
    done: Any = None
    """A CUDA event that is waited for without spinning."""

    @classmethod
    def on(cls, pool: torch.Tensor, rows: int) -> _Way:
        """On the pool's device."""
        bounce = pool.new_empty((rows, pool.shape[1]))
        if not pool.is_cuda:
            return cls(bounce)
        stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        return cls(bounce, stream, torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def turns(self, slots: Sequence[int], places: Sequence[int]) -> Iterator[Iterator[_Turn]]:
        """Blocks and places, turn by turn, on this way's stream; in the end all are complete.

        The turns share the bounce: on one stream, the next begins behind the last.
        """
        with torch.cuda.stream(self.stream):
            yield self._turns(slots, places)
            if self.done is not None:
                self.done.record(self.stream)
                self.done.synchronize()

    def _turns(self, slots: Sequence[int], places: Sequence[int]) -> Iterator[_Turn]:
        for start in range(0, len(slots), len(self.bounce)):
            end = start + len(self.bounce)
            index = torch.tensor(slots[start:end], device=self.bounce.device)
            yield _Turn(index, self.bounce[: len(index)], places[start:end])


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, first place, count) of neighbours."""
    first = 0
    for row in range(1, len(places) + 1):
        if row == len(places) or places[row] != places[row - 1] + 1:
            yield first, places[first], row - first
            first = row
