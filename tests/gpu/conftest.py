"""Tests of the CUDA path. Without a GPU its kernels run under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this once, when first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
