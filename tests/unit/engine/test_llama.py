"""What the model records, beside what it computes (tests/integration/test_parity.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loadtest.shapes import describe

from quire.engine.models.config import read_config
from quire.engine.models.llama import Llama, weight_shapes
from quire.engine.models.weights import DummyWeights
from quire.kernels import cpu
from quire.kernels.cpu import library as lib
from quire.kernels.cpu.program import LOGIT_ROWS, TOKENS
from quire.kernels.layout import KvLayout

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = cpu.StepLimits(max_tokens=32, max_seqs=4, max_blocks_per_seq=4, max_logit_rows=4)


def test_a_prompt_pays_for_one_layer_less(tmp_path: Path) -> None:
    """Behind the last layer's attention only rows whose logits are wanted are computed."""
    config = read_config(describe("tiny", tmp_path))
    layout = KvLayout(
        config.num_layers, config.num_kv_heads, config.head_dim, "float32", cpu.KV_ORDERS["float32"]
    )
    ops = cpu.CpuOps(layout, LIMITS, cpu.Team(1))
    weights = DummyWeights(weight_shapes(config), torch.float32, 0)
    Llama(config, ops, weights, max_positions=64).forward(ops)
    domains = [op.domain for op in ops._recorded if op.code == lib.OP_CODES[lib.LinearArgs]]
    matmuls = 4 * config.num_layers + 1
    last = ["o", "gate_up", "down", "head"]
    assert domains == [TOKENS] * (matmuls - len(last)) + [LOGIT_ROWS] * len(last)
