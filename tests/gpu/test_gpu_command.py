"""`python -m loadtest.gpu` end to end at a size that runs anywhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from loadtest.gpu.__main__ import main, run
from loadtest.gpu.engine import weight_bytes
from loadtest.gpu.figures import FULL, DecodeModel
from loadtest.shapes import describe

from quire.engine.models.config import read_config

# where there is a GPU, these are its tests
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
TOY = replace(
    FULL,
    device="cuda" if torch.cuda.is_available() else "cpu",
    copy_bytes=1 << 20,
    models=(DecodeModel("tiny", 0.5),),
    batch_sizes=(1, 2),
    decode_tokens=4,
    heads=(4, 2, 16),
    uniform=(40, 40),
    skewed=(70, 10),
    matrices=((64, 128),),
    matmul_rows=(1,),
    throughput_shape="tiny",
    num_requests=3,
    request_lens=(2, 5),
)


def test_every_part_of_the_command_runs(tmp_path, capsys) -> None:
    run(TOY, tmp_path / "models", tmp_path / "gpu")
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert [f["name"] for f in figures] == [
        "copy bandwidth, read and written",
        "decode attention, share of the bandwidth",
        "decode attention, skewed over uniform",
        "int4 matmul over bf16, batch 1",
        "tiny, batch 1: time between tokens",
        "tiny, batch 1: weights over bandwidth, of it",
        "tiny, batch 1: outside the model",
        "tiny, batch 2: time between tokens",
        "tiny, batch 2: outside the model",
        "output tokens per second",
        "transformers, continuous batching",
        "quire over transformers",
    ]
    assert all(f["value"] > 0 for f in figures if "outside" not in f["name"])
    assert "wanted: <= 1.15" in capsys.readouterr().out


@pytest.mark.parametrize(("shape", "gigabytes"), [("8B", 15.01), ("L", 1.19)])
def test_the_bound_counts_what_a_decode_step_reads(shape, gigabytes, tmp_path) -> None:
    config = read_config(describe(shape, tmp_path))
    assert weight_bytes(config) / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(capsys) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "loadtest.gpu needs a CUDA device, and torch finds none\n"
