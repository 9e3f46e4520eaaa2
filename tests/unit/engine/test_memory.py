"""How many KV blocks an engine gets, and what it says when they are too few."""

import pytest

from quire.engine.runner.memory import KvBudget, KvCacheTooSmall, num_blocks

BLOCK_BYTES = 1000


def test_blocks_that_fit():
    assert num_blocks(KvBudget(10_999, "test"), BLOCK_BYTES, 160) == 10


def test_too_few_blocks_name_what_would_fit():
    with pytest.raises(KvCacheTooSmall, match=r"use --max-model-len 64 or less, or give .* 10000 "):
        num_blocks(KvBudget(4_500, "test"), BLOCK_BYTES, 160)


def test_no_block_at_all_leaves_more_memory_as_the_only_advice():
    with pytest.raises(KvCacheTooSmall, match=r"\(test\): give --kv-cache-memory-bytes 10000 "):
        num_blocks(KvBudget(-5, "test"), BLOCK_BYTES, 160)
