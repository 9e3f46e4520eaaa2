"""Keeps keys of the outside out of the tests."""

import pytest
from fake_openai_server import running


@pytest.fixture
def serving():
    """`async with serving(gap_s=...) as server`."""
    return running


@pytest.fixture(autouse=True)
def no_keys_from_outside(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "QUIRE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
