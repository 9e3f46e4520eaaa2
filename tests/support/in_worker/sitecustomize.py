"""Python imports this at its start when the folder is first in PYTHONPATH, in a worker and in the
ranks that it starts. What the tests change there, by environment variables:

    QUIRE_TEST_POOL=device     whatever backend computes, its pool passes for a device's (`pools`)
    QUIRE_TEST_STATES=FOLDER   transfers come by the states that tests hold them at (`gates`)
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


class _Change(MetaPathFinder):
    """Finds a module as everyone does, and changes it once it is loaded."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, name, path, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self._change(module)

        spec.loader.exec_module = exec_module
        return spec


def _device_pool(module: ModuleType) -> None:
    from pools import kv_memory

    module.CpuBackend.kv_memory = module.TorchBackend.kv_memory = kv_memory


def _gated_sender(module: ModuleType) -> None:
    from gates import gate_sender

    gate_sender(module.SendingTransfer, os.environ["QUIRE_TEST_STATES"])


def _gated_receiver(module: ModuleType) -> None:
    from gates import gate_receiver

    gate_receiver(module.ReceivingTransfer, os.environ["QUIRE_TEST_STATES"])


if os.environ.get("QUIRE_TEST_POOL") == "device":
    sys.meta_path.insert(0, _Change("quire.engine.runner.backend", _device_pool))
if "QUIRE_TEST_STATES" in os.environ:
    sys.meta_path.insert(0, _Change("quire.transfer.sending", _gated_sender))
    sys.meta_path.insert(0, _Change("quire.transfer.receiving", _gated_receiver))
