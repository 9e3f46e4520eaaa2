"""Exchange between ranks through torch.distributed: gloo from host memory, nccl between GPUs.

The process groups are made by hand, not as torch's default group: a script that uses `LLM` may have
one of its own. gloo only carries bytes; sums are ours, in the order of ranks, because gloo's own
order depends on the size of the message. nccl sums by itself.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

if TYPE_CHECKING:
    import numpy as np

dist: Any = torch.distributed
"""Untyped: torch's stubs lack the classes of process groups and stores."""

JOIN_S = 60
"""Every rank has said hello before the group is made: what remains is to connect."""
EXCHANGE_LIMIT = timedelta(hours=1)
"""No detector of failures, which `gang` is: one rank may load for long while another waits."""


def serve_store(host: str, size: int) -> tuple[Any, int]:
    """Rank 0's key-value store through which ranks find each other, and its port.

    Listens on `host` only: torch by itself would listen on every interface.
    """
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timedelta(seconds=JOIN_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def reach_store(host: str, port: int, size: int) -> Any:
    """The store as another rank sees it."""
    return dist.TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=JOIN_S))


class TorchGroup:
    """A `quire.kernels.group.Group` of processes. One thread uses it."""

    def __init__(self, store: Any, rank: int, size: int, address: str) -> None:
        """Connect to the other ranks from the interface with `address`; raises RuntimeError."""
        self.rank = rank
        self.size = size
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = EXCHANGE_LIMIT
        self._host = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)
        self._store = store
        self._nccl: Any = None

    def all_gather(self, parts: np.ndarray, part: np.ndarray) -> None:
        """Put `part` [n] of every rank into `parts` [size * n], by rank."""
        self._host._allgather_base(torch.from_numpy(parts), torch.from_numpy(part)).wait()

    def gather(self, parts: np.ndarray, part: np.ndarray) -> None:
        """The same on rank 0."""
        root = dist.GatherOptions()
        root.rootRank = 0
        into = [list(torch.from_numpy(parts).chunk(self.size))] if self.rank == 0 else []
        self._host.gather(into, [torch.from_numpy(part)], root).wait()

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, float32."""
        if part.is_cuda:
            # in the model's dtype: half the bytes, and what every GPU engine does
            self._group_of(part).allreduce([part]).wait()
            return part.float()
        parts = self._gathered(part.float())
        total = parts[0]
        for other in parts[1:]:
            total = total + other
        return total

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The columns of all ranks' [rows, n] side by side, on rank 0; elsewhere `part` itself."""
        if not len(part):
            return part.new_empty(0, part.shape[1] * self.size)
        parts = self._gathered(part)
        return torch.cat(list(parts), dim=1) if self.rank == 0 else part

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """[size, *part.shape] on every rank."""
        parts = part.new_empty(self.size, *part.shape)
        group = self._group_of(part)
        group._allgather_base(parts.view(-1), part.contiguous().view(-1)).wait()
        return parts

    def _group_of(self, tensor: torch.Tensor) -> Any:
        """The process group for the tensor's device; the one between GPUs is made at first use."""
        if not tensor.is_cuda:
            return self._host
        if self._nccl is None:
            torch.cuda.set_device(tensor.device)
            store = dist.PrefixStore("nccl", self._store)
            options = dist.ProcessGroupNCCL.Options()
            self._nccl = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        return self._nccl
