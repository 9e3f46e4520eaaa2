"""What is to hold before and after an exchange between GPUs, where there is none."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from quire.engine.parallel.group import interface_of
from quire.engine.parallel.runner import ParallelRunner
from quire.engine.parallel.watch import RankFailed
from quire.engine.runner import load
from quire.engine.runner.runner import ModelRunner


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip")
def test_the_interface_with_an_address_is_found_by_it() -> None:
    listed = subprocess.run(["ip", "-o", "-4", "addr"], check=True, capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        _, name, _, address = line.split()[:4]
        address = address.partition("/")[0]
        if "secondary" not in line:
            assert interface_of(address) == (None if address.startswith("127.") else name)
    assert interface_of("192.0.2.1") is None


def test_ranks_with_and_without_a_gpu_do_not_wait_for_each_other() -> None:
    for alike in ([0, 0], [1, 1, 1]):
        load._check_devices(np.array(alike))
    with pytest.raises(ValueError, match=r"no CUDA device for rank 1, 3 of 4, .* --device cpu"):
        load._check_devices(np.array([1, 0, 1, 0]))


class Lost:
    """Other ranks, one of which is lost while a step runs; the exchange was broken off."""

    def send(self, plan) -> None:
        pass

    def check(self) -> None:
        raise RankFailed("rank 1 was killed")

    def give_up(self, error) -> None:
        raise AssertionError("nothing was raised")


def test_what_a_broken_off_exchange_gave_is_no_result(monkeypatch) -> None:
    nonsense = "tokens that mean nothing"
    monkeypatch.setattr(ModelRunner, "launch", lambda self, plan: lambda: nonsense)
    runner = ParallelRunner.__new__(ParallelRunner)
    runner._followers = Lost()
    with pytest.raises(RankFailed, match="was killed"):
        runner.launch(None)
