"""The ranks of a tensor-parallel engine as threads of this process: the exchange without a network.

Every rank runs the code that a rank process runs; only the group and the gang are local.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.engine.engine import Engine
from quire.engine.parallel import plan_bytes
from quire.engine.parallel.runner import ParallelRunner
from quire.engine.runner.load import Place, find_model, load_rank, loaded_model

if TYPE_CHECKING:
    from quire.config.engine import EngineConfig
    from quire.engine.scheduler.plan import StepPlan

WAIT_S = 60


class Board:
    """Where the threads of a group put what the others read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list = [None] * size
        self.barrier = threading.Barrier(size, timeout=WAIT_S)

    def exchange(self, rank: int, part: np.ndarray) -> list[np.ndarray]:
        """What every rank put here, by rank."""
        self.parts[rank] = part
        self.barrier.wait()
        parts = [each.copy() for each in self.parts]
        self.barrier.wait()  # nobody overwrites what somebody has yet to read
        return parts


class ThreadGroup:
    """One rank's view of a board; see `quire.kernels.group.Group`."""

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.size = board, rank, board.size

    def all_gather(self, parts, part) -> None:
        parts[:] = np.concatenate(self.board.exchange(self.rank, part))

    def gather(self, parts, part) -> None:
        gathered = self.board.exchange(self.rank, part)
        if self.rank == 0:
            parts[:] = np.concatenate(gathered)

    def sum(self, part):
        total, *others = map(torch.from_numpy, self.board.exchange(self.rank, part.float().numpy()))
        for other in others:
            total = total + other
        return total

    def join(self, part):
        parts = self.board.exchange(self.rank, part.numpy())
        return torch.from_numpy(np.concatenate(parts, axis=1)) if self.rank == 0 else part


class Followers:
    """The threads of the ranks beyond the first."""

    def __init__(self, choice, board: Board) -> None:
        self.board = board
        self.errors: list[BaseException] = []
        self.queues = [queue.SimpleQueue() for _ in range(1, board.size)]
        for number, plans in enumerate(self.queues, start=1):
            args = (choice, number, plans)
            threading.Thread(target=self._follow, args=args, daemon=True).start()

    def send(self, plan: StepPlan) -> None:
        for plans in self.queues:
            plans.put(plan_bytes.pack(plan))

    def check(self) -> None:
        assert not self.errors

    def give_up(self, error: Exception) -> None:
        raise AssertionError(f"a rank failed: {self.errors}") from error

    def close(self) -> None:
        for plans in self.queues:
            plans.put(None)

    def _follow(self, choice, rank: int, plans) -> None:
        try:
            place = Place(ThreadGroup(self.board, rank), rank, self.board.size)
            backend = load_rank(choice, place, lambda _: None).runner.backend
            while (data := plans.get()) is not None:
                inputs, copies = plan_bytes.unpack(data)
                if len(copies):
                    backend.copy_blocks(copies)
                backend.compute(inputs)
        except BaseException as error:
            self.errors.append(error)
            self.board.barrier.abort()
            raise


def load_in_threads(config: EngineConfig) -> Engine:
    """An engine of `config.tensor_parallel_size` ranks, all in this process."""
    choice = find_model(config)
    size = config.tensor_parallel_size
    board = Board(size)
    followers = Followers(choice, board)
    rank = load_rank(choice, Place(ThreadGroup(board, 0), 0, size), lambda _: None)
    loaded = loaded_model(choice, replace(rank, runner=ParallelRunner(rank.runner, followers)))
    engine = Engine(config, loaded)
    engine.close_ranks = followers.close
    return engine
