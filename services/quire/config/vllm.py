"""vLLM options that people paste and that mean nothing here, or that cannot be honoured.

Spellings of options that do exist here are aliases of the field, not entries of these tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.values import ConfigError


@dataclass(frozen=True)
class Foreign:
    """An option of vLLM without a field here."""

    takes_value: bool
    reason: str
    harmless: str | None = None
    """A value that asks for nothing, in a table of refusals."""


IGNORED = {
    "enable_chunked_prefill": Foreign(False, "prompts are always computed in chunks"),
    "disable_log_requests": Foreign(False, "prompts are never logged"),
    "enable_log_requests": Foreign(False, "prompts are never logged"),
    "disable_log_stats": Foreign(False, "statistics are at /metrics, not in the log"),
    "disable_frontend_multiprocessing": Foreign(False, "the engine is always its own process"),
    "swap_space": Foreign(True, "preempted requests are recomputed"),
    "distributed_executor_backend": Foreign(True, "one process runs the engine"),
}
"""Accepted with a warning that says why they change nothing."""

REFUSED = {
    "trust_remote_code": Foreign(
        False, "code from a model repository is never run; models are built into Quire"
    ),
    "enable_lora": Foreign(False, "LoRA adapters are not supported yet"),
    "lora_modules": Foreign(True, "LoRA adapters are not supported yet"),
    "speculative_config": Foreign(True, "speculative decoding is not supported yet"),
    "kv_transfer_config": Foreign(True, "prefill and decode in separate pods come later"),
    "pipeline_parallel_size": Foreign(True, "pipeline parallelism is not supported yet", "1"),
    "data_parallel_size": Foreign(True, "start one server per replica", "1"),
}
"""Rejected: leaving them out silently would change what the server does."""


def judge(name: str, value: object) -> str | None:
    """A warning about an option in these tables, None when there is nothing to say.

    `value` is True for a flag without one. Raises ConfigError when the option is refused.
    """
    if name in IGNORED:
        return f"{name} is ignored: {IGNORED[name].reason}"
    refused = REFUSED[name]
    if value is None or value is False or str(value) == refused.harmless:
        return None
    raise ConfigError(f"{name}: {refused.reason}")
