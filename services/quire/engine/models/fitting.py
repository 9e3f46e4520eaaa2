"""A model's config as an engine's options want it computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quire.engine.models.config import read_config
from quire.engine.models.partition import check_degree
from quire.engine.quantization.config import choose

if TYPE_CHECKING:
    from pathlib import Path

    from quire.config.engine import EngineConfig
    from quire.engine.models.config import ModelConfig


def fitting_config(options: EngineConfig, folder: Path) -> ModelConfig:
    """The config in `folder`, its weights as --quantization and --load-format want them.

    Raises ValueError, with what to change, when it cannot be read or split over the ranks.
    """
    model = read_config(folder)
    chosen = choose(options.quantization, model.quantization)
    if chosen is not None and options.load_format == "dummy":
        chosen = chosen.as_rounded()
    model = replace(model, quantization=chosen)
    check_degree(model, options.tensor_parallel_size)
    return model
