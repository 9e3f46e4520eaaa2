"""Checkpoint weights: safetensors files, memory-mapped, each tensor taken once by name."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from quire.engine.models.config import read_json
from quire.engine.models.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

Progress = "Callable[[int, int], None]"
"""Called with (bytes taken so far, bytes in all)."""

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints carry and every loader recomputes."""


class Weights(Protocol):
    """Where a model takes its weights from."""

    def take(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor of that name, or some rows or columns of it, in the checkpoint's dtype.

        Raises ValueError when it is missing.
        """

    def ignore(self, name: str) -> None:
        """The tensor, if there, is not needed."""


class SafetensorsWeights:
    """The tensors of a folder's safetensors files; use as a context manager.

    `finish` raises ValueError when tensors were left over: the model would silently miss a part.
    """

    def __init__(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._progress = progress
        self._taken = 0
        paths = weight_files(folder)
        self.total_bytes = sum(path.stat().st_size for path in paths)
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path.name} is not a valid safetensors file: {error}") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> SafetensorsWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def take(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor, or a part of it: a view of the mapped file, of which only what is used is
        read. Raises ValueError when it is missing or already taken."""
        file = self._files.pop(name, None)
        if file is None:
            raise ValueError(f"the checkpoint has no tensor {name!r}")
        tensor: torch.Tensor = file.get_tensor(name)
        self._taken += tensor.nbytes
        if self._progress is not None:
            self._progress(self._taken, self.total_bytes)
        return _part(tensor, rows, columns)

    def ignore(self, name: str) -> None:
        """The tensor, if there, is not needed."""
        self._files.pop(name, None)

    def finish(self) -> None:
        """Raise ValueError unless every tensor was taken or ignored, or adds nothing."""
        left = [name for name in self._files if not self._is_idle(name)]
        if left:
            shown = ", ".join(sorted(left)[:3])
            raise ValueError(f"{len(left)} tensors of the checkpoint were not used: {shown} …")

    def _is_idle(self, name: str) -> bool:
        """The model is the same without the tensor: GPTQ writers store biases of zeros."""
        if name.endswith(IGNORED_SUFFIXES):
            return True
        return name.endswith(".bias") and not self._files[name].get_tensor(name).any()


class DummyWeights:
    """Random weights in the shapes of a config: for benchmarks without a checkpoint."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        self._shapes = shapes
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def take(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """Norms are ones, everything else is normal with the usual initial deviation of 0.02.

        A rank draws all of a tensor to keep its part: the model is the same at any degree.
        """
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype)
        whole = torch.randn(shape, generator=self._generator).mul_(0.02)
        return _part(whole, rows, columns).to(self._dtype)

    def ignore(self, name: str) -> None:
        """Nothing is left over."""


def _part(tensor: torch.Tensor, rows: range | None, columns: range | None) -> torch.Tensor:
    if rows is not None:
        tensor = tensor[rows.start : rows.stop]
    return tensor if columns is None else tensor[:, columns.start : columns.stop]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index or by name.

    Raises ValueError when there are none or one is missing, UnsupportedModel for pickled weights,
    which are never read.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any("/" in name or name.startswith(".") for name in names):
            raise ValueError(f"{index.name} names a file outside the model folder")
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(names)} weight files missing: {missing[0]} …")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise UnsupportedModel(
            "only pickled weights (.bin, .pt) found; they can run code when read, so they never "
            "are: convert them to safetensors"
        )
    raise ValueError(f"no .safetensors files in {folder}")
