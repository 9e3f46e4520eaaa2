"""Exchange between ranks through torch.distributed: gloo from host memory, nccl between GPUs.

The process groups are made by hand, not as torch's default group: a script that uses `LLM` may have
one of its own. gloo only carries bytes; sums are ours, in the order of ranks, because gloo's own
order depends on the size of the message. nccl sums by itself.

An exchange of gloo fails when a rank's process ends. One of nccl waits on the GPU, for ever, and
with it whoever waits for the GPU: `abort` breaks it off, and what it gave then means nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed

dist: Any = torch.distributed
"""Untyped: torch's stubs lack the classes of process groups and stores."""

SIOCGIFADDR = 0x8915
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
    """A `quire.kernels.group.Group` of processes. One thread uses it, any may abort it."""

    def __init__(self, store: Any, rank: int, size: int, address: str) -> None:
        """Connect to the other ranks from the interface with `address`; raises RuntimeError."""
        self.rank = rank
        self.size = size
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = EXCHANGE_LIMIT
        self._host = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)
        self._store, self._address = store, address
        self._nccl: Any = None

    def abort(self) -> None:
        """A rank is lost: end what waits for it on a GPU."""
        if self._nccl is not None:
            self._nccl.abort()

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
        """The sum of all ranks' tensors, float32. Waits for every rank, also with no rows."""
        if not part.numel():
            self.sum(part.new_zeros(1))
            return part.float()
        if part.is_cuda:
            # in the model's dtype: half the bytes, and what every GPU engine does
            total = part.contiguous()
            self._group_of(part).allreduce([total]).wait()
            return total.float()
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
            self._nccl = self._between_gpus(tensor.device)
        return self._nccl

    def _between_gpus(self, device: torch.device) -> Any:
        # the store waits for a minute at most, while another rank may load for long
        self.all_gather(np.empty(self.size, np.int64), np.zeros(1, np.int64))
        # torch's watchdog, and who watches that, would end the process: `gang` notices, and aborts
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        if (name := interface_of(self._address)) is not None:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = EXCHANGE_LIMIT
        store = dist.PrefixStore("nccl", self._store)
        return dist.ProcessGroupNCCL(store, self.rank, self.size, options)


def interface_of(address: str) -> str | None:
    """Name of the network interface with an IPv4 address: nccl cannot be told an address.

    None where it may choose, which is within a host, or when no interface has it."""
    if address.startswith("127."):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(sock, SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
