"""`quire.kernels.cpu` with its library; a test module that imports this is skipped without it."""

from __future__ import annotations

import pytest

cpu = pytest.importorskip("quire.kernels.cpu")
try:
    cpu.load()
except cpu.CpuKernelsUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)
