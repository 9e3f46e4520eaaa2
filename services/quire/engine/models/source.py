"""Which files of a checkpoint the engine reads, and the fingerprint they have."""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING

from quire.engine.models.weights import weight_files
from quire.text.folder import TEXT_FILES

if TYPE_CHECKING:
    from pathlib import Path

CHECKPOINT_FILES = ("*.safetensors", *TEXT_FILES)
"""What is fetched of a hub repository. No code and no pickled weights."""
SAMPLE_BYTES = 4096
SAMPLES_PER_FILE = 64


def fingerprint(
    folder: Path, dtype: str, quantization: str, dummy_seed: int | None = None
) -> bytes:
    """16 bytes that name the model for the block hashes: equal on every host with the same files.

    Covers config.json, every weight file's name, size and header, evenly spaced samples of its
    data, the compute dtype and how weights are quantized while they load. Reading all weights would
    take seconds per model for no use: checkpoints that differ, differ everywhere. Random weights
    are named by their seed instead.
    """
    paths = weight_files(folder) if dummy_seed is None else []
    state = blake2b(digest_size=16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = [config, dtype, quantization, dummy_seed]
    state.update(json.dumps(named, sort_keys=True).encode())
    for path in paths:
        size = path.stat().st_size
        state.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            header_size = min(struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0], size)
            state.update(file.read(header_size))
            for i in range(SAMPLES_PER_FILE):
                file.seek(8 + header_size + (size - header_size) * i // SAMPLES_PER_FILE)
                state.update(file.read(SAMPLE_BYTES))
    return state.digest()
