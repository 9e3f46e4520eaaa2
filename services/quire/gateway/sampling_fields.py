"""Request fields -> SamplingParams, the same for chat and completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.api.sampling import SamplingParams
from quire.gateway.fields import integer, invalid, text, unsupported, wrong_type

if TYPE_CHECKING:
    from quire.gateway.fields import Fields

NUMBERS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
INTEGERS = ("n", "top_k", "min_tokens", "prompt_logprobs")
FLAGS = ("include_stop_str_in_output", "ignore_eos")

STRUCTURED = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_decoding_backend", "guided_whitespace_pattern", "grammar", "regex", "json_schema",
)  # fmt: skip
STEERING = (
    "kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "remote_host",
    "remote_port", "remote_block_ids", "remote_engine_id", "data_parallel_rank",
    "routed_dp_rank",
)  # fmt: skip
NOT_YET = (
    "prompt_embeds", "logits_processors", "mm_processor_kwargs", "lora_path",
    "thinking_token_budget", "vllm_xargs", "use_beam_search", "length_penalty",
)  # fmt: skip
HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity", "parallel_tool_calls", "spaces_between_special_tokens",
    "return_tokens_as_token_ids", "return_token_ids", "add_special_tokens",
)  # fmt: skip
"""Fields with no bearing on the answer here: accepted without a word."""


def refuse_dangerous(fields: Fields) -> None:
    """Raise ApiError for fields that would change the answer's meaning and are not supported."""
    fields.refuse(STRUCTURED, "structured outputs are not available.")
    fields.refuse(STEERING, "only the server decides this.")
    for key in NOT_YET:
        value = fields.take(key)
        # false and a neutral 1.0 ask for nothing
        if value is True or value not in (None, False, 1, [], {}):
            raise unsupported(fields.name(key), "it is not available.")


def sampling_params(fields: Fields, defaults: dict[str, Any], **given: Any) -> SamplingParams:
    """The parameters in `fields`; `defaults` fills what is absent, `given` is already read.

    `max_tokens` stays open: it depends on the prompt. Raises ApiError naming the field.
    """
    values: dict[str, Any] = {}
    for key in NUMBERS:
        values[key] = fields.number(key)
    for key in INTEGERS:
        values[key] = fields.integer(key)
    for key in FLAGS:
        values[key] = fields.boolean(key)
    values["seed"] = fields.integer("seed", -(2**63), 2**64 - 1)
    values["stop"] = _stop(fields)
    values["stop_token_ids"] = fields.integers("stop_token_ids")
    values["allowed_token_ids"] = fields.integers("allowed_token_ids")
    values["logit_bias"] = _logit_bias(fields)
    values["bad_words"] = fields.array("bad_words")
    values["skip_special_tokens"] = fields.boolean("skip_special_tokens", True)
    values.update(given)
    # what the request leaves open: the model's default, else the neutral value
    chosen: dict[str, Any] = defaults | {k: v for k, v in values.items() if v is not None}
    return SamplingParams(**{**chosen, "max_tokens": None})


def _stop(fields: Fields) -> list[str]:
    value = fields.take("stop")
    if value is None:
        return []
    if isinstance(value, str):
        # many clients send "" for no stop string
        return [value] if value else []
    if not isinstance(value, list):
        raise wrong_type("stop", "a string or an array of strings", value)
    return [text(f"stop[{i}]", item) for i, item in enumerate(value)]


def _logit_bias(fields: Fields) -> dict[int, float]:
    bias = fields.object("logit_bias")
    if bias is None:
        return {}
    parsed: dict[int, float] = {}
    for key in bias.rest():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            message = "Invalid 'logit_bias': its keys must be token ids."
            raise invalid("logit_bias", message)
        value = bias.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type("logit_bias", "an object of numbers", value)
        parsed[integer("logit_bias", int(key))] = float(value)
    return parsed
