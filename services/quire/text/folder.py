"""Where a model's tokenizer files are, and what their JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT_FILES = ("*.json", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")
"""Files of a Hugging Face repository that the text layer may need; no weights."""


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """The local folder with the tokenizer of `model`: "demo", a folder, or a Hugging Face id.

    Downloads the tokenizer's files of a Hugging Face id when they are not cached yet.
    Raises FileNotFoundError when there is no tokenizer.json.
    """
    folder = _locate(model, revision)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}")
    return folder


def _locate(model: str, revision: str | None) -> Path:
    if model == "demo":
        from quire import demo

        return demo.path()
    if Path(model).is_dir():
        return Path(model)
    # imported here: a second of start-up that local folders need not pay
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=list(TEXT_FILES)))


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
