"""Host to device and back by way of pinned memory, without waiting for the device.

Every transfer has pinned memory of its own, which torch's allocator keeps and gives out again when
the device is through with it: a buffer that is written anew would have to wait for the steps that
are still to read it. On a CPU it is plain memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the array; behind what was launched before."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


def put(parts: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Small integer arrays as int32 tensors of the same shapes, in one transfer."""
    sizes = [part.size for part in parts]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    flat, start = host.numpy(), 0
    for part, size in zip(parts, sizes, strict=True):
        flat[start : start + size] = part.reshape(-1)
        start += size
    views = torch.split(host.to(device, non_blocking=True), sizes)
    return [view.view(part.shape) for view, part in zip(views, parts, strict=True)]


def fetch(tensors: Sequence[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """Bring small tensors to the host; what is returned waits until they, and everything launched
    before, are complete."""
    on_host = []
    for tensor in tensors:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        on_host.append(host.copy_(tensor, non_blocking=True))
    done = next((_event(tensor.device) for tensor in tensors if tensor.is_cuda), None)

    def wait() -> list[np.ndarray]:
        if done is not None:
            done.synchronize()
        return [np.array(host.numpy()) for host in on_host]

    return wait


def _event(device: torch.device) -> torch.cuda.Event:
    """Behind what was launched on the device's stream."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
