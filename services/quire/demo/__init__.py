"""The demo model: a small Llama that `quire serve` loads when no model is named."""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder of the embedded model, in the Hugging Face layout."""
    return Path(__file__).parent / "model"
