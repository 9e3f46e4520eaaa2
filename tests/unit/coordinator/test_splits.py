"""A degree that does not divide a model is said before anything is placed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from quire.config.fleet import fleet_from
from quire.coordinator.splits import check_splits


def fleet(*pools: dict, **engine: object):
    named = [{"name": f"p{i}", "engine": own} for i, own in enumerate(pools)]
    return fleet_from({"models": [{"name": "m", "engine": engine, "pools": named}]})


async def test_the_pool_and_the_degrees_that_work_are_named():
    with pytest.raises(ValueError, match=r"pool p1: tensor_parallel_size=4 .* 1, 2, 6 ranks"):
        await check_splits(fleet({"tensor-parallel-size": 2}, {"tensor-parallel-size": 4}))


def test_quire_up_says_it_in_one_line_and_starts_no_ray(tmp_path):
    pools = [{"name": "wide", "engine": {"tensor-parallel-size": 4}}]
    content = {
        "listen": f"unix:{tmp_path}/c.sock", "state_dir": str(tmp_path / "state"),
        "models": [{"name": "m", "pools": pools}],
    }  # fmt: skip
    (tmp_path / "fleet.yaml").write_text(json.dumps(content))
    words = ["-m", "quire", "up", "-f", str(tmp_path / "fleet.yaml")]
    done = subprocess.run(
        [sys.executable, "-P", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("quire: error: pool wide: tensor_parallel_size=4 does not fit")


async def test_what_can_be_split_is_accepted():
    await check_splits(fleet({}, model="demo", tensor_parallel_size=6))


@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_parallel_size": 1},
        {"tensor_parallel_size": 7, "model": "/of/other/hosts"},
        {"tensor_parallel_size": 7, "model": "nobody/has-this-here"},
    ],
)
async def test_nothing_is_asked_of_one_rank_nor_of_files_elsewhere(engine, monkeypatch):
    monkeypatch.setattr(asyncio, "create_subprocess_exec", None)
    await check_splits(fleet({}, **engine))


async def test_a_model_in_the_hubs_cache_is_checked(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pool p0: "):
        await check_splits(fleet({}, model="some/model", tensor_parallel_size=2))
