"""Where a model's tokenizer files are, and what their JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quire.text.hub import ModelNotFound, download

TEXT_FILES = ("*.json", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")
"""Files of a Hugging Face repository that the text layer may need; no weights."""


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """The folder with the tokenizer of `model`. Raises as `locate` does, and ModelNotFound without
    tokenizer.json."""
    folder = locate(model, revision)
    if not (folder / "tokenizer.json").is_file():
        raise ModelNotFound(f"no tokenizer.json in {folder}")
    return folder


def locate(model: str, revision: str | None = None, files: tuple[str, ...] = TEXT_FILES) -> Path:
    """Folder of a model's files: "demo", a local folder, or a Hugging Face id.

    A hub id's `files` are downloaded into the hub's cache (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE
    apply). Raises ModelNotFound with what to change, HubUnreachable.
    """
    if (folder := _local(model)) is not None:
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelNotFound(f"no model folder at {model!r}, and it is not a Hugging Face id")
    return download(model, revision, files)


def locate_here(model: str, revision: str | None = None) -> Path | None:
    """The folder, where `locate` would find a config.json without a download; else None."""
    if (folder := _local(model)) is not None or model.count("/") != 1:
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _local(model: str) -> Path | None:
    if model == "demo":
        from quire import demo

        return demo.path()
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in `folder/name`, or {} when the file does not exist. ValueError if malformed."""
    path = folder / name
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Sampling parameters that the model's generation_config.json sets, as vLLM reads them."""
    generation = read_json(folder, "generation_config.json")
    return {k: generation[k] for k in SAMPLING_DEFAULTS if generation.get(k) is not None}


def eos_token_ids(folder: Path) -> list[int]:
    """End-of-sequence ids of the model's generation_config.json, else config.json; maybe empty."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder, name).get("eos_token_id")
        if isinstance(value, int):
            return [value]
        if isinstance(value, list):
            return [int(v) for v in value]
    return []
