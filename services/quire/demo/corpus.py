"""The training text: Python's standard library, split into training and held-out files.

The life of a file: found under the library's root, read, kept unless it is a table or a
duplicate, put on one side of the split by the hash of its name, and used there both as plain
source and as the raw material of conversations (`chat.py`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Folders which hold foreign code, generated tables, or text that is no Python.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "data"})
# Build records of one particular machine: they would teach the model that machine's paths.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT_ONE_IN = 50
MIN_ASCII_SHARE = 0.98
MAX_MEAN_LINE_CHARS = 120


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file; `name` is its path below the library's root, with forward slashes."""

    name: str
    text: str

    @property
    def module(self) -> str:
        """The dotted name under which the file is imported."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True, slots=True)
class Corpus:
    """The two sides of the split; no file, and no copy of a file, is on both."""

    train: list[SourceFile]
    held_out: list[SourceFile]


def library_root() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the library in name order and split it; the same library gives the same corpus."""
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    seen: set[bytes] = set()
    for file in _source_files(root or library_root()):
        digest = hashlib.sha256(file.text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        (held_out if is_held_out(file.name) else train).append(file)
    return Corpus(train, held_out)


def is_held_out(name: str) -> bool:
    """Whether the file is kept from training; decided by the name alone, about 1 in 50."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _source_files(root: Path) -> list[SourceFile]:
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    files = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        if _is_skipped(name):
            continue
        text = _read_text(path)
        if text is not None and _is_prose_or_code(text):
            files.append(SourceFile(name, text))
    return files


def _is_skipped(name: str) -> bool:
    parts = name.split("/")
    in_skipped_folder = not SKIPPED_FOLDERS.isdisjoint(parts[:-1])
    return in_skipped_folder or any(part.startswith(SKIPPED_PREFIXES) for part in parts)


def _read_text(path: Path) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:  # test files in other encodings
        return None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _is_prose_or_code(text: str) -> bool:
    """False for empty files, tables of characters and files of very long lines."""
    if not text.strip():
        return False
    ascii_share = sum(character.isascii() for character in text) / len(text)
    mean_line_chars = len(text) / (text.count("\n") + 1)
    return ascii_share >= MIN_ASCII_SHARE and mean_line_chars <= MAX_MEAN_LINE_CHARS
