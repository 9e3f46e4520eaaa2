"""Whether models can be split over the ranks of their pools, asked before anything is placed.

Of a model whose files are on this host; of another its engine says so. Asked in a process of its
own, `python -m quire.coordinator.splits`, because of torch, which the coordinator has no use for:

    stdin [[pool, folder, {options of the engine}], ...]
    exit code 2, and one line on stderr, when one cannot be
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.config.base import from_mapping, to_mapping
from quire.config.engine import EngineConfig
from quire.config.exit_codes import CANNOT_SERVE
from quire.config.last_word import PREFIX, last_word
from quire.text.folder import locate_here

if TYPE_CHECKING:
    from quire.config.fleet import Fleet

logger = logging.getLogger(__name__)


async def check_splits(fleet: Fleet) -> None:
    """Raises ValueError with what to change."""
    asked = _questions(fleet)
    if not asked:
        return
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "quire.coordinator.splits", stdin=pipe, stderr=pipe
    )
    try:
        said = (await process.communicate(json.dumps(asked).encode()))[1].decode(errors="replace")
    except asyncio.CancelledError:
        process.kill()
        raise
    word = last_word(said.splitlines())
    if process.returncode == CANNOT_SERVE:
        raise ValueError(word)
    if process.returncode:
        logger.warning("cannot tell whether models fit their ranks: %s", word)


def _questions(fleet: Fleet) -> list[tuple[str, str, dict[str, Any]]]:
    asked = []
    for name in fleet.pools:
        engine = fleet.model_of(name).engine_of(name)
        if engine.tensor_parallel_size > 1:
            folder = locate_here(engine.model, engine.revision)
            if folder is not None:
                asked.append((name, str(folder), to_mapping(engine)))
    return asked


def main() -> int:
    """Read the questions, answer with the exit code."""
    from quire.engine.models.fitting import fitting_config

    for pool, folder, options in json.load(sys.stdin):
        try:
            fitting_config(from_mapping(EngineConfig, options), Path(folder))
        except ValueError as error:
            print(f"{PREFIX}pool {pool}: {error}", file=sys.stderr)
            return CANNOT_SERVE
    return 0


if __name__ == "__main__":
    sys.exit(main())
