"""One tokenizer of every kind, ours and transformers', per session."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quire.text.tokenizer import Tokenizer

# tests are imported by path (import-mode=importlib), so a module beside them is loaded by path too
_spec = importlib.util.spec_from_file_location(
    "tokenizer_folders", Path(__file__).with_name("tokenizer_folders.py")
)
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)


@dataclass
class Pair:
    """Our tokenizer and the reference, of one folder."""

    folder: Path
    ours: Tokenizer
    theirs: Any


def load_reference(folder: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for kind, build in folders.KINDS.items():
        folder = build(root / kind)
        made[kind] = Pair(folder, Tokenizer(folder), load_reference(folder))
    return made


@pytest.fixture(params=list(folders.KINDS))
def pair(request, pairs) -> Pair:
    return pairs[request.param]


@pytest.fixture(scope="session")
def tokenizer_folders():
    return folders
