"""Rotary tables: every entry is the nearest float32, so that no two workers disagree on one.

A worker whose table is off in the fifth digit answers plausibly, and not as the others do: what it
decodes over blocks that another one computed is then neither's.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quire.engine.models.config import RopeConfig
from quire.engine.models.rope import build_rope

CONFIGS = {
    "default": RopeConfig(theta=1e4, rotary_dim=64),
    "odd": RopeConfig(theta=5e5, rotary_dim=22),
    "linear": RopeConfig(theta=1e4, rotary_dim=16, kind="linear", parameters={"factor": 4.0}),
}
NUM_POSITIONS = 1040


@pytest.mark.parametrize("name", CONFIGS)
def test_entries_are_the_nearest_to_the_exact_values(name) -> None:
    config = CONFIGS[name]
    rope = build_rope(config, NUM_POSITIONS)
    exponents = torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim
    inverse = 1.0 / config.theta**exponents / config.parameters.get("factor", 1.0)
    angles = (torch.arange(NUM_POSITIONS).float()[:, None] * inverse).tolist()
    for table, function in ((rope.cos, math.cos), (rope.sin, math.sin)):
        exact = np.array([[function(angle) for angle in row] for row in angles])
        # torch's own, by comparison, are one unit off at every twentieth entry, at best
        assert (table.numpy() == exact.astype(np.float32)).all()
