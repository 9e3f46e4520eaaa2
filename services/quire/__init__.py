"""Quire: serve large language models with prefill and decode in separate pods.

`LLM` and `SamplingParams` are imported on first use, so that `import quire` stays light: nothing
here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quire.api.sampling import SamplingParams
    from quire.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """PEP 562: resolve the public names lazily."""
    if name == "SamplingParams":
        from quire.api.sampling import SamplingParams

        return SamplingParams
    if name == "LLM":
        from quire.llm import LLM

        return LLM
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
