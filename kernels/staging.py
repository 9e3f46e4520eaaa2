"""Host to device and back without waiting in between: pinned memory, one transfer each way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALLEST = 1 << 12
"""Elements of a new buffer; it grows by doubling."""


class Staging:
    """Moves small 32-bit arrays to a device, packed into one asynchronous transfer.

    What `put` returns is fresh memory of the device. The host side is one pinned buffer, written
    anew when the device has taken the last contents over; on a CPU it is plain memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._pinned = torch.empty(0, dtype=torch.int32)
        self._taken: Any = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]

    def put(self, parts: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The integer arrays as int32 tensors of the same shapes on the device."""
        size = sum(part.size for part in parts)
        flat = self.pack(parts, size).to(self.device, non_blocking=True, copy=True)
        self.sent()
        views = torch.split(flat, [part.size for part in parts])
        return [view.view(part.shape) for view, part in zip(views, parts, strict=True)]

    def pack(self, parts: Sequence[np.ndarray], size: int) -> torch.Tensor:
        """The host buffer [size] holding the parts, one after the other: to be copied from, and
        `sent` called after that."""
        if size > len(self._pinned):
            shape = max(size, SMALLEST, 2 * len(self._pinned))
            self._pinned = torch.empty(shape, dtype=torch.int32, pin_memory=self._is_cuda)
        elif self._taken is not None:
            self._taken.synchronize()
        host, start = self._pinned.numpy(), 0
        for part in parts:
            host[start : start + part.size] = part.reshape(-1)
            start += part.size
        return self._pinned[:size]

    def sent(self) -> None:
        """A copy from the host buffer has been started."""
        if self._taken is not None:
            self._taken.record()


class Fetch:
    """Brings a small int32 tensor to the host: one asynchronous copy, then one wait."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._pinned = torch.empty(0, dtype=torch.int32)

    def __call__(self, tensor: torch.Tensor) -> np.ndarray:
        """A copy of the tensor's values."""
        if not self._is_cuda:
            return np.array(tensor.numpy())
        if tensor.numel() > len(self._pinned):
            size = max(tensor.numel(), SMALLEST)
            self._pinned = torch.empty(size, dtype=torch.int32, pin_memory=True)
        landing = self._pinned[: tensor.numel()].view(tensor.shape)
        landing.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return np.array(landing.numpy())
