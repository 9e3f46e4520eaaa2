"""Decode steps captured once per batch size over static buffers, and replayed.

A decode step has one row per sequence. Its batch is padded to the next bucket:

    rows   [0 ........ S)[S ........ bucket)
           sequences     copies of one sequence of length 1 in the scratch block, which nobody reads

Everything else a step needs (where rows are written, how attention is divided) is derived on the
device from the positions and block tables in the static buffers, inside the graph.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from quire.kernels.ops import StepInputs
from quire.kernels.reference import cache_slots
from quire.kernels.staging import put, to_device
from quire.kernels.torch_ops import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.engine.models.llama import Llama
    from quire.engine.runner.backend import StepLimits
    from quire.kernels.torch_ops import TorchOps

FINE = (1, 2, 4, 8, 16)
COARSE = 16
"""Beyond the fine ones, buckets are multiples of this."""
NUM_FIELDS = 5
"""Per-row arrays of a step: token, position, block, slot, logit row."""


class Graph(Protocol):
    """Recorded work on static buffers."""

    def replay(self) -> None:
        """Do the work again, on what the buffers hold now."""


class Capture(Protocol):
    """Records what a function does to static buffers."""

    def __call__(self, work: Callable[[], None]) -> Graph:
        """Run `work`, perhaps several times, and record it."""


class CudaCapture:
    """Captures CUDA graphs, which share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Graph:
        """Warm up on a side stream (kernels are compiled, workspaces made), then capture."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads (KV transfer) may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        return graph


class Rerun:
    """A "graph" that runs the function again: the same logic where there is no GPU."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work
        work()


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending, the last one `max_num_seqs`."""
    coarse = range(FINE[-1] + COARSE, max_num_seqs, COARSE)
    return sorted({*(size for size in FINE if size < max_num_seqs), *coarse, max_num_seqs})


def is_decode(inputs: StepInputs) -> bool:
    """Every sequence has exactly one row."""
    return len(inputs.token_ids) == len(inputs.context_lens)


def pad_decode(inputs: StepInputs, size: int, scratch_block: int) -> StepInputs:
    """A decode step of `size` rows, all of whose logits are wanted."""
    missing = size - len(inputs.token_ids)
    tables = np.pad(inputs.block_tables, ((0, missing), (0, 0)))
    tables[size - missing :, 0] = scratch_block
    return StepInputs(
        token_ids=np.pad(inputs.token_ids, (0, missing)),
        positions=np.pad(inputs.positions, (0, missing)),
        query_start=np.arange(size + 1, dtype=np.int32),
        context_lens=np.pad(inputs.context_lens, (0, missing), constant_values=1),
        block_tables=tables,
        logit_rows=np.arange(size, dtype=np.int32),
    )


class DecodeGraphs:
    """The captured decode steps of a model over the pool that `ops` has now, whose last block is
    the scratch block."""

    def __init__(self, model: Llama, ops: TorchOps, limits: StepLimits, capture: Capture) -> None:
        self._model = model
        self._ops = ops
        self._scratch_block = len(ops.pool) - 1
        self.buckets = bucket_sizes(limits.max_seqs)
        largest = self.buckets[-1]
        shape = (largest, limits.max_blocks_per_seq)
        self._fields = torch.zeros((NUM_FIELDS, largest), dtype=torch.int32, device=ops.device)
        self._tables = torch.full(shape, self._scratch_block, dtype=torch.int32, device=ops.device)
        self._fields[2] = self._scratch_block
        self._logits: torch.Tensor | None = None
        # the largest first: the others fit into the memory that it needed
        self._graphs = {size: capture(partial(self._work, size)) for size in reversed(self.buckets)}

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [R, V] of a decode step, valid until the next run."""
        num_rows = len(inputs.token_ids)
        size = next(bucket for bucket in self.buckets if bucket >= num_rows)
        self._fill(pad_decode(inputs, size, self._scratch_block))
        self._graphs[size].replay()
        logits = self._static_logits(size)
        rows = inputs.logit_rows
        if np.array_equal(rows, np.arange(num_rows)):
            return logits[:num_rows]
        return logits[to_device(rows.astype(np.int64), logits.device)]

    def _fill(self, inputs: StepInputs) -> None:
        """Put a padded step into the static buffers: one transfer, two copies on the device."""
        size, columns = inputs.block_tables.shape
        _, block, slot = cache_slots(inputs)
        fields = (inputs.token_ids, inputs.positions, block, slot, inputs.logit_rows)
        rows, tables = put([np.stack(fields), inputs.block_tables], self._ops.device)
        self._fields[:, :size].copy_(rows)
        self._fields[0, :size].copy_(self._ops.known(rows[0], inputs.token_ids))
        self._tables[:size, :columns].copy_(tables)

    def _work(self, size: int) -> None:
        """What a graph records: the model over the first `size` rows of the static buffers."""
        tokens, positions, block, slot, logit_rows = self._fields[:, :size].unbind()
        step = Step(None, tokens, positions, block, slot, logit_rows, self._tables[:size])
        self._ops.begin_static(step)
        logits = self._model.forward(self._ops)
        if self._logits is None:
            self._logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self._static_logits(size).copy_(logits)

    def _static_logits(self, size: int) -> torch.Tensor:
        """One buffer for every graph: [size, V]; on ranks beyond the first, something else."""
        if self._logits is None:
            raise RuntimeError("nothing was captured")
        return self._logits[:size]
