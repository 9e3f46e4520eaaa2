"""Which part of a model each rank holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engines import model_config

from quire.engine.models.partition import Partition, check_degree
from quire.kernels.group import part_of
from quire.transfer.layout import Shard

MODEL = replace(model_config(307), num_heads=8, num_kv_heads=2, head_dim=4, intermediate_size=30)


def parts(degree: int) -> list[Partition]:
    return [Partition.of(MODEL, Shard(rank, degree)) for rank in range(degree)]


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_ranks_hold_everything_between_them(degree):
    for name, total in (("q", 32), ("inner", 30), ("vocabulary", 307)):
        held = [i for part in parts(degree) for i in getattr(part, name)]
        assert held == list(range(total)), name
    assert {i for part in parts(degree) for i in part.kv} == set(range(8))


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_rank_has_the_kv_heads_that_its_query_heads_read(degree):
    for part in parts(degree):
        heads = {row // 4 for row in part.q}
        assert {head // 4 for head in heads} == {row // 4 for row in part.kv}


def test_with_more_ranks_than_kv_heads_each_is_held_by_neighbours():
    assert [part.kv.start // 4 for part in parts(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("model", "degree", "fitting"),
    [
        (MODEL, 3, "1, 2, 4, 8"),
        (replace(MODEL, num_heads=6, num_kv_heads=3), 2, "1, 3, 6"),
        (replace(MODEL, num_heads=6, num_kv_heads=3), 4, "1, 3, 6"),
        (replace(MODEL, num_heads=6, num_kv_heads=2), 3, "1, 2, 6"),
        (MODEL, 16, "1, 2, 4, 8"),
        (replace(MODEL, intermediate_size=9), 8, "1, 2"),
    ],
)
def test_a_degree_that_does_not_fit_is_refused_with_those_that_do(model, degree, fitting):
    with pytest.raises(ValueError, match=f"over {fitting} ranks: give --tensor-parallel-size"):
        check_degree(model, degree)


def test_parts_are_equal_but_for_the_last():
    assert [len(part_of(307, rank, 4)) for rank in range(4)] == [77, 77, 77, 76]
    assert [len(part_of(5, rank, 4)) for rank in range(4)] == [2, 2, 1, 0]
