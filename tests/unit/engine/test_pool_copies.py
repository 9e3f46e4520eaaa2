"""Blocks between a torch pool and places: exactly those that were asked for, whatever their order,
on a CPU and, with `pytest -m gpu`, on a CUDA device beside kernels that run."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.runner import pool_copies
from quire.engine.runner.pool_copies import PoolCopies

HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no GPU")]
    ),
]
SHAPE = (2, 3, 2, 16)  # a block: heads, layers, K and V, tile
BLOCK_BYTES = 2 * 3 * 2 * 16 * 2


def pool_on(device: str, num_blocks: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-(1 << 15), 1 << 15, (num_blocks, *SHAPE), generator=generator)
    return values.to(torch.int16).view(torch.bfloat16).to(device)


def rows(pool: torch.Tensor) -> np.ndarray:
    """The pool's bytes, [blocks, bytes], at this moment."""
    return pool.flatten(1).view(torch.uint8).cpu().numpy().copy()


def places_of(copies: PoolCopies) -> np.ndarray:
    return np.asarray(copies.places)


def check_round_trip(device: str, slots: list[int], places: list[int], targets: list[int]) -> None:
    pool = pool_on(device)
    copies = PoolCopies(pool, 20 * BLOCK_BYTES)
    before = rows(pool)
    places_of(copies)[:] = 5
    copies.copy_out(slots, places)
    assert (places_of(copies)[places] == before[slots]).all()
    others = np.setdiff1d(np.arange(20), places)
    assert (places_of(copies)[others] == 5).all()
    copies.copy_in(targets, places)
    after = rows(pool)
    assert (after[targets] == before[slots]).all()
    untouched = np.setdiff1d(np.arange(len(before)), targets)
    assert (after[untouched] == before[untouched]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.randoms(use_true_random=False), st.integers(1, 25))
def test_any_blocks_at_any_places_in_any_number_of_turns(count, random, bounce_blocks):
    saved, pool_copies.BOUNCE_BYTES = pool_copies.BOUNCE_BYTES, bounce_blocks * BLOCK_BYTES
    try:
        slots, places, targets = (random.sample(range(n), count) for n in (40, 20, 40))
        check_round_trip("cpu", slots, places, targets)
    finally:
        pool_copies.BOUNCE_BYTES = saved


@pytest.mark.parametrize("device", DEVICES)
def test_neighbours_strangers_and_one_alone(device):
    check_round_trip(device, [3, 4, 5, 39, 0], [7, 8, 9, 0, 19], [1, 2, 3, 39, 7])
    check_round_trip(device, [17], [4], [0])


@pytest.mark.parametrize("device", DEVICES)
def test_places_are_as_many_as_fit_and_at_least_two(device):
    pool = pool_on(device)
    copies = PoolCopies(pool, 20 * BLOCK_BYTES + BLOCK_BYTES // 2)
    assert places_of(copies).shape == (20, BLOCK_BYTES)
    assert (copies.num_blocks, copies.block_bytes) == (40, BLOCK_BYTES)
    with pytest.raises(ValueError, match=f"give at least {2 * BLOCK_BYTES}"):
        PoolCopies(pool, 2 * BLOCK_BYTES - 1)


@pytest.mark.parametrize("device", DEVICES)
def test_both_directions_at_once_beside_steps(device):
    """One thread copies out, one in, while this one computes into blocks that neither has."""
    pool = pool_on(device, 60)
    copies = PoolCopies(pool, 20 * BLOCK_BYTES)
    before = rows(pool)
    places_of(copies)[10:] = before[40:50]
    out = threading.Thread(
        target=lambda: [copies.copy_out(range(10), range(10)) for _ in range(50)]
    )
    into = threading.Thread(
        target=lambda: [copies.copy_in(range(10, 20), range(10, 20)) for _ in range(50)]
    )
    for thread in (out, into):
        thread.start()
    step = torch.zeros(20, *SHAPE, dtype=torch.bfloat16, device=device)
    for _ in range(50):
        step += 1
        pool[20:40] = step
    for thread in (out, into):
        thread.join()
    assert (places_of(copies)[:10] == before[:10]).all()
    after = rows(pool)
    assert (after[10:20] == before[40:50]).all()
    assert (pool[20:40] == 50).all()
    assert (after[:10] == before[:10]).all() and (after[40:] == before[40:]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no GPU")
def test_a_copy_does_not_wait_for_a_step_that_runs():
    pool = pool_on("cuda")
    copies = PoolCopies(pool, 20 * BLOCK_BYTES)
    copies.copy_out([0], [0])  # what is made lazily exists
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # a second or so of the stream that steps run on
    done.record()
    copies.copy_out(range(10), range(10))
    copies.copy_in(range(20, 30), range(10))
    assert not done.query(), "the copies came behind the step"
    torch.cuda.synchronize()
