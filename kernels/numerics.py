"""What decides the bits of a result, beside the model and its dtype.

Processes that say the same compute the same bits. Those that do not round differently here and
there: a sequence that began with one and goes on with the other may get tokens that neither of
them would have given alone.
"""

from __future__ import annotations

import re

import torch

from quire.kernels.cpu import isa

ROUNDING = 1
"""Raised by every change of kernels, or of the order they are called in, that changes a bit."""


def cpu_kernels() -> str:
    """Of the compiled CPU library, in one word."""
    return f"cpu/{isa()}/{ROUNDING}"


def torch_kernels(device: torch.device) -> str:
    """Of torch's operations, and on a GPU the Triton kernels, in one word."""
    if device.type == "cuda":  # tiles, and with them the order of sums, are chosen by its name
        name = torch.cuda.get_device_name(device)
    else:
        name = torch.backends.cpu.get_cpu_capability()
    kind = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return f"torch-{torch.__version__}/{kind}/{ROUNDING}"
