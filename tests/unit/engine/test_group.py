"""What is to hold before and after an exchange between GPUs, where there is none."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quire.engine.parallel import group
from quire.engine.parallel.group import TorchGroup, interface_of
from quire.engine.parallel.runner import ParallelRunner
from quire.engine.parallel.watch import RankFailed
from quire.engine.runner import load
from quire.engine.runner.runner import ModelRunner
from quire.kernels.cpu.exchange import Exchange


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


def test_ranks_meet_before_nccl_is_set_up_for_the_device_of_each(monkeypatch) -> None:
    """And nothing but what lies on the GPU goes that way."""
    did: list[object] = []
    environment: dict[str, str] = {}
    made = SimpleNamespace(
        allreduce=lambda tensors: SimpleNamespace(wait=lambda: did.append(("sum", len(tensors)))),
        abort=lambda: did.append("abort"),
    )

    def nccl(store, rank, size, options):
        did.append(("nccl", store, rank, size, options._timeout))
        return made

    nccl.Options = SimpleNamespace
    fake = SimpleNamespace(ProcessGroupNCCL=nccl, PrefixStore=lambda name, store: (name, store))
    monkeypatch.setattr(group, "dist", fake)
    monkeypatch.setattr(group.os, "environ", environment)
    monkeypatch.setattr(group.torch.cuda, "set_device", lambda device: did.append(device))
    monkeypatch.setattr(TorchGroup, "all_gather", lambda *_: did.append("met"))
    one = TorchGroup.__new__(TorchGroup)
    one.rank, one.size, one._store, one._address, one._nccl = 1, 2, "store", "127.0.0.1", None
    one._host = "gloo"
    one.abort()  # before there is anything to break off
    device = torch.device("cuda", 1)
    on_gpu = SimpleNamespace(is_cuda=True, device=device)
    assert one._group_of(on_gpu) is one._group_of(on_gpu) is made
    joined = ("nccl", ("nccl", "store"), 1, 2, group.EXCHANGE_LIMIT)
    assert did == ["met", device, joined]
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert environment["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert one._group_of(torch.zeros(1)) == "gloo"
    one.abort()
    assert did[-1] == "abort"


class Counted:
    """A group that counts what it was asked to exchange."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.gathered: list[int] = []

    def all_gather(self, parts, part) -> None:
        self.gathered.append(len(part))
        parts[:] = np.tile(part, self.size)

    def gather(self, parts, part) -> None:
        self.all_gather(parts, part)


@pytest.mark.parametrize(("num_rows", "for_all", "exchanged"), [(0, True, 1), (0, False, 0)])
def test_a_step_that_draws_nothing_waits_for_every_rank_behind_its_last_attention(
    num_rows, for_all, exchanged
) -> None:
    group = Counted()
    part, parts = np.zeros((4, 8), np.float32), np.zeros((4, 16), np.float32)
    Exchange(0, group, 0, part, parts, is_for_all=for_all).run(num_rows)
    assert len(group.gathered) == exchanged
