"""Finds a model's files: the embedded demo, a local folder, or a Hugging Face id."""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from pathlib import Path

from quire.engine.models.weights import weight_files

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
"""What is fetched of a hub repository. No code and no pickled weights."""
SAMPLE_BYTES = 4096
SAMPLES_PER_FILE = 64


class ModelNotFound(ValueError):
    """The model is neither a folder nor a repository that can be reached."""


def resolve(model: str, revision: str | None = None) -> Path:
    """Folder of the model's files; downloads a hub id into the hub's cache (HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE apply). Raises ModelNotFound with what to check."""
    if model == "demo":
        from quire import demo

        return demo.path()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelNotFound(f"no model folder at {model!r}, and it is not a Hugging Face id")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=FILES))
    except GatedRepoError:
        raise ModelNotFound(f"access to {model} must be granted: set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"{model} is neither a local folder nor a repository on the hub (if it is private, "
            "set HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelNotFound(
            f"{model} is not in the local hub cache and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelNotFound(f"{model} could not be fetched: {reason}") from None


def fingerprint(folder: Path, dtype: str) -> bytes:
    """16 bytes that name the model for the block hashes: equal on every host with the same files.

    Covers config.json, every weight file's name, size and header, evenly spaced samples of its
    data, and the compute dtype. Reading all weights would take seconds per model for no use:
    checkpoints that differ, differ everywhere.
    """
    state = blake2b(digest_size=16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state.update(json.dumps([config, dtype], sort_keys=True).encode())
    for path in weight_files(folder):
        size = path.stat().st_size
        state.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            header_size = min(struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0], size)
            state.update(file.read(header_size))
            for i in range(SAMPLES_PER_FILE):
                file.seek(8 + header_size + (size - header_size) * i // SAMPLES_PER_FILE)
                state.update(file.read(SAMPLE_BYTES))
    return state.digest()
