"""Which bytes of a block go where, for any two tensor-parallel degrees."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.layout import KvLayout, KvOrder
from quire.transfer.layout import (
    BlockLayout,
    Shard,
    block_bytes,
    heads_of,
    pieces,
    share,
    sources_of,
)


def layout_of(heads):
    return BlockLayout("m", "bfloat16", 16, num_layers=3, num_kv_heads=heads, head_dim=8)


@st.composite
def pairs(draw):
    heads = draw(st.sampled_from([1, 2, 3, 4, 8, 12]))
    fits = st.sampled_from([d for d in range(1, 25) if heads % d == 0 or d % heads == 0])
    return heads, draw(fits), draw(fits)


@given(pairs())
def test_the_ranks_of_any_two_degrees_give_every_destination_its_block_exactly_once(case):
    heads, source_degree, degree = case
    layout = layout_of(heads)
    truth = np.arange(layout.head_bytes * heads, dtype=np.uint32).reshape(heads, -1)

    def block(shard):
        held = heads_of(heads, shard)
        return truth[held.start : held.stop].reshape(-1)

    for rank in range(degree):
        destination = Shard(rank, degree)
        got = np.zeros(block_bytes(layout, destination), np.uint32)
        times = np.zeros_like(got)
        for source_rank in sources_of(layout, source_degree, destination):
            source = Shard(source_rank, source_degree)
            for part in pieces(share(layout, source, destination), 100):
                assert 0 < part.length <= 100
                there = slice(part.destination, part.destination + part.length)
                got[there] = block(source)[part.source : part.source + part.length]
                times[there] += 1
        assert (times == 1).all()
        assert (got == block(destination)).all()


@given(pairs())
def test_a_replicated_head_is_sent_by_the_lowest_rank_that_holds_it(case):
    heads, source_degree, degree = case
    layout = layout_of(heads)
    for rank in range(degree):
        for source in sources_of(layout, source_degree, Shard(rank, degree)):
            held = heads_of(heads, Shard(source, source_degree))
            lower = range(source)
            assert all(heads_of(heads, Shard(r, source_degree)) != held for r in lower)


def test_degrees_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="8 KV heads cannot be split over 3 ranks"):
        share(layout_of(8), Shard(0, 3), Shard())
    with pytest.raises(ValueError, match="outside a group"):
        Shard(2, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"}, {"dtype": "float32"}, {"block_size": 32}, {"num_layers": 4},
        {"num_kv_heads": 8}, {"head_dim": 16}, {"order": "pairs"}, {"quantization": "int8"},
    ],
)  # fmt: skip
def test_every_part_of_the_layout_is_in_the_fingerprint(change):
    layout = layout_of(4)
    assert replace(layout).fingerprint() == layout.fingerprint()
    assert replace(layout, **change).fingerprint() != layout.fingerprint()


def test_the_fingerprint_is_the_same_in_every_version():
    """N and N - 1 pair by it: changing how it is made is a wire version of its own."""
    assert layout_of(4).fingerprint().hex() == "77da3c95f496debd3112d90f68aad13d"


def test_bytes_agree_with_the_pool_of_the_kernels():
    kv = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16", order=KvOrder.PAIRS)
    layout = BlockLayout.of(kv, model="m", numerics="n", num_kv_heads=8)
    assert block_bytes(layout, Shard(1, 4)) == kv.block_bytes
    assert layout.order == "pairs"


def test_transfer_imports_neither_torch_nor_the_engine():
    code = (
        "import sys, quire.transfer.endpoint, quire.transfer.transports;"
        "bad = [m for m in sys.modules if m == 'torch' or m.startswith(('quire.engine', 'nixl'))];"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
