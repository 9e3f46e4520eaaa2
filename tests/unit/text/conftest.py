"""One tokenizer of every kind, ours and transformers', per session."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import tokenizer_folders as folders

from quire.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


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
