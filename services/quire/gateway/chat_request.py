"""POST /v1/chat/completions: body -> GenerationRequest."""

from __future__ import annotations

import json
from typing import Any

from quire.api.errors import ApiError, echo
from quire.api.sampling import MAX_LOGPROBS, MAX_N
from quire.gateway.fields import INT64_MAX, Fields, invalid, missing, text, unsupported, wrong_type
from quire.gateway.request import GenerationRequest, common
from quire.gateway.sampling_fields import HARMLESS, refuse_dangerous, sampling_params
from quire.text.chat_template import ChatRequest

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_NAME = 256
MAX_TEMPLATE_KWARGS = 64
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MEDIA_PARTS = (
    "image_url", "image", "input_image", "input_audio", "audio_url", "audio", "video_url",
    "video", "file", "input_file",
)  # fmt: skip
TEMPLATE_RESERVED = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "return_dict",
)  # fmt: skip


def parse_chat(
    fields: Fields, defaults: dict[str, Any], template_variables: frozenset[str]
) -> GenerationRequest:
    """The request in `fields`, whose model is already taken. Raises ApiError naming the field."""
    refuse_dangerous(fields)
    _refuse(fields)
    chat = parse_conversation(fields, template_variables)
    max_tokens = _max_tokens(fields)
    shared = common(fields)
    num_top = _logprobs(fields)
    if shared["delivery"].stream and fields.take("prompt_logprobs") is not None:
        raise unsupported("prompt_logprobs", "not together with 'stream'.")
    fields.integer("n", 1, MAX_N)
    params = sampling_params(
        fields,
        defaults,
        logprobs=num_top,
        prompt_logprobs=fields.integer("prompt_logprobs", 0, MAX_LOGPROBS),
    )
    if max_tokens is not None and params.min_tokens > max_tokens:
        message = f"'min_tokens' ({params.min_tokens}) is above 'max_tokens' ({max_tokens})."
        raise ApiError("integer_above_max_value", message, "min_tokens")
    for key in HARMLESS:
        fields.take(key)
    return GenerationRequest(
        kind="chat",
        prompts=[chat],
        params=params,
        max_tokens=max_tokens,
        asked_max_tokens=max_tokens is not None,
        num_top=num_top,
        ignored=tuple(fields.rest()),
        **shared,
    )


def parse_conversation(fields: Fields, template_variables: frozenset[str]) -> ChatRequest:
    """The conversation to render; also what /tokenize takes. Raises ApiError naming the field."""
    messages = fields.array("messages", max_length=MAX_MESSAGES)
    if messages is None:
        raise missing("messages")
    if not messages:
        raise ApiError("empty_array", "'messages' must not be empty.", "messages")
    parsed = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    continue_final = fields.boolean("continue_final_message")
    add_prompt = fields.boolean("add_generation_prompt", default=not continue_final)
    if continue_final and add_prompt:
        message = "'continue_final_message' and 'add_generation_prompt' contradict each other."
        raise invalid("continue_final_message", message)
    return ChatRequest(
        messages=parsed,
        add_generation_prompt=add_prompt,
        continue_final_message=continue_final,
        template_kwargs=_template_kwargs(fields, template_variables),
    )


def _refuse(fields: Fields) -> None:
    tools = fields.array("tools")
    if tools is not None:
        if not tools:
            raise ApiError("empty_array", "'tools' must not be empty.", "tools")
        raise unsupported("tools", "tool calls are not available.")
    fields.refuse(("functions",), "tool calls are not available.")
    for key in ("tool_choice", "function_call"):
        if fields.take(key) not in (None, "none", "auto"):
            raise unsupported(key, "tool calls are not available.")
    response_format = fields.object("response_format")
    if response_format is not None and response_format.take("type") != "text":
        raise unsupported("response_format", "structured outputs are not available.")
    fields.refuse(("chat_template",), "the server's template is used.")
    fields.refuse(("documents", "audio", "web_search_options"), "it is not available.")
    modalities = fields.array("modalities")
    if modalities is not None and modalities != ["text"]:
        raise unsupported("modalities", "only text is generated.")
    if fields.boolean("echo"):
        raise unsupported("echo", "only completions can echo their prompt.")


def _max_tokens(fields: Fields) -> int | None:
    old = fields.integer("max_tokens", 1, INT64_MAX)
    new = fields.integer("max_completion_tokens", 1, INT64_MAX)
    if old is not None and new is not None and old != new:
        message = "'max_tokens' and 'max_completion_tokens' contradict each other."
        raise invalid("max_tokens", message)
    return old if new is None else new


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    return (top or 0) if wanted else None


def _template_kwargs(fields: Fields, variables: frozenset[str]) -> dict[str, Any]:
    kwargs = fields.object("chat_template_kwargs")
    effort = fields.string("reasoning_effort", max_length=MAX_NAME)
    given: dict[str, Any] = {}
    if effort is not None and "reasoning_effort" in variables:
        given["reasoning_effort"] = effort
    if kwargs is None:
        return given
    names = kwargs.rest()
    for name in names[:MAX_TEMPLATE_KWARGS]:
        path = kwargs.name(name)[:MAX_NAME]
        if name in TEMPLATE_RESERVED or name not in variables:
            raise invalid(path, f"'{path}' is not a variable of the model's chat template.")
        given[name] = kwargs.take(name)
    return given


def _message(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    fields = Fields(value, path)
    role = fields.string("role")
    if role is None:
        raise missing(fields.name("role"))
    if role not in ROLES:
        expected = ", ".join(ROLES)
        raise invalid(f"{path}.role", f"'{path}.role' must be one of {expected}, not {echo(role)}.")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    for key in ("name", "tool_call_id"):
        short = fields.string(key, max_length=MAX_NAME)
        if short is not None:
            message[key] = short
    for key in ("reasoning_content", "reasoning", "thinking"):
        reasoning = fields.string(key)
        if reasoning is not None:
            message[key] = reasoning
    calls = _tool_calls(fields) if role == "assistant" else None
    if calls:
        message["tool_calls"] = calls
    content = _content(fields, may_be_empty=role == "assistant")
    return {**message, "content": content}


def _content(fields: Fields, *, may_be_empty: bool) -> str | list[dict[str, str]]:
    name = fields.name("content")
    value = fields.take("content")
    if value is None:
        if may_be_empty:
            return ""
        if not fields.has("content"):
            raise missing(name)
        raise invalid(name, f"'{name}' must not be null.")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of parts", value)
    if not value:
        raise ApiError("empty_array", f"'{name}' must not be empty.", name)
    if len(value) > MAX_PARTS:
        message = f"'{name}' has {len(value)} parts; at most {MAX_PARTS} are allowed."
        raise ApiError("array_above_max_length", message, name)
    return [_part(part, f"{name}[{i}]") for i, part in enumerate(value)]


def _part(value: object, path: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    fields = Fields(value, path)
    kind = fields.string("type")
    if kind is None:
        raise missing(f"{path}.type")
    if kind in MEDIA_PARTS:
        raise unsupported(path, "this model reads text only.")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise invalid(f"{path}.type", f"'{path}.type' must be text, not {echo(kind)}.")
    key = "refusal" if kind == "refusal" else "text"
    if fields.take(key) is None:
        raise missing(f"{path}.{key}")
    return {"type": "text", "text": text(f"{path}.{key}", fields.take(key))}


def _tool_calls(fields: Fields) -> list[dict[str, Any]]:
    """Calls made earlier in the conversation, with arguments as templates want them: objects."""
    calls = fields.array("tool_calls", max_length=MAX_PARTS) or []
    parsed = []
    for i, call in enumerate(calls):
        path = f"{fields.name('tool_calls')}[{i}]"
        if not isinstance(call, dict):
            raise wrong_type(path, "an object", call)
        function = Fields(call, path).object("function")
        if function is None:
            raise missing(f"{path}.function")
        name = function.string("name", max_length=MAX_NAME)
        if name is None:
            raise missing(f"{path}.function.name")
        arguments = function.take("arguments")
        if isinstance(arguments, str):
            arguments = _arguments(arguments)
        made = {"name": name, "arguments": {} if arguments is None else arguments}
        parsed.append({"id": call.get("id"), "type": "function", "function": made})
    return parsed


def _arguments(written: str) -> Any:
    try:
        return json.loads(written or "{}")
    except (ValueError, RecursionError):
        return written  # a model may have written them badly: the template shows what it wrote
