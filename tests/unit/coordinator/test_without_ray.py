"""Whoever does not coordinate does not import Ray."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "quire.cli.serve quire.cli.gateway quire.cli.router quire.cli.worker quire.cli.status "
    "quire.cli.scale quire.cli.role quire.cli.up quire.gateway.app quire.router.server "
    "quire.coordinator.client quire.coordinator.keeper quire.coordinator.supervisor"
)


def test_only_the_connection_to_the_cluster_imports_ray():
    code = (
        f"import importlib, sys\nfor name in {MODULES.split()!r}: importlib.import_module(name)\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
