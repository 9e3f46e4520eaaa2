"""Small integers packed into 32-bit words, as checkpoints hold them."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] as uint8 [rows, words * 32 / bits], the lowest bits of a word first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values: torch.Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return values.to(torch.uint8).flatten(-2)


def centred(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned values moved down by half their range, as int8: what was 2^(bits - 1) is zero."""
    # adding half and wrapping is subtracting it
    moved: torch.Tensor = values - 2 ** (bits - 1)
    return moved.view(torch.int8)


def word_range(values: range, bits: int) -> range:
    """The words that hold a run of values. Raises ValueError where it would cut one."""
    per_word = 32 // bits
    if values.start % per_word:
        raise ValueError(f"columns from {values.start} on begin within a packed word")
    return range(values.start // per_word, -(-values.stop // per_word))


def zero_points(values: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Unsigned zero points, moved down by half the range, as int16; None for zero everywhere."""
    zeros = values.to(torch.int16) - 2 ** (bits - 1)
    return zeros if zeros.any() else None
