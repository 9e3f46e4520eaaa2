"""Makes the fake server importable in tests, and keeps keys of the outside out of them."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "fake_openai_server", Path(__file__).parent / "fake_server.py"
)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)


@pytest.fixture
def serving():
    """`async with serving(gap_s=...) as server`."""
    return module.running


@pytest.fixture(autouse=True)
def no_keys_from_outside(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "QUIRE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
