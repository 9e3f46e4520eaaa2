"""Python imports this at its start when the folder is first in PYTHONPATH, in a worker and in the
ranks that it starts: whatever backend computes there, its pool passes for a device's."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder

BACKEND = "quire.engine.runner.backend"


class _Change(MetaPathFinder):
    """Finds the backend's module as everyone does, and changes it once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != BACKEND:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            from pools import kv_memory

            module.CpuBackend.kv_memory = module.TorchBackend.kv_memory = kv_memory

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Change())
