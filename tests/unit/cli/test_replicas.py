"""Several workers on one machine share it."""

import os

import pytest

from quire.cli.replicas import shared
from quire.config.engine import EngineConfig


def test_one_worker_has_the_machine_to_itself():
    engine = EngineConfig()
    assert shared(engine, 1) == engine


@pytest.mark.parametrize("count", [2, 1000])
def test_cpus_and_memory_are_shared(count):
    engine = shared(EngineConfig(), count)
    assert engine.num_threads == max(1, len(os.sched_getaffinity(0)) // count)
    assert engine.memory_utilization == 0.5 / count


def test_what_is_given_is_each_workers():
    engine = EngineConfig(num_threads=3, kv_cache_memory_bytes=1 << 20)
    assert shared(engine, 4) == engine
