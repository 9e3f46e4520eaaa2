"""Conversations to text, by the model's Jinja template.

The environment is the one `transformers` gives templates (tests compare outputs), in a sandbox,
with bounds: a template is part of a model folder, which may come from anywhere.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_RENDERED_CHARS = 64 << 20
MAX_RENDER_S = 10.0
"""Seconds a template may take, checked between pieces of output and at every call it makes."""
MAX_TEMPLATE_INT = 1 << 20
"""Largest number a template may multiply or pad with: "x" * 10**10 would fill the memory."""
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_WORDS = ("role", "type")
"""Keys whose values are checked against a list of words, and compared by templates."""
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What a template renders."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """Leave the last message open, for the model to go on with it."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """Every string that the caller wrote, in order."""
        yield from _strings(self.messages)
        yield from _strings(self.tools)
        yield from _strings(self.template_kwargs)

    def with_texts(self, change: Callable[[str], str]) -> ChatRequest:
        """The same request with every string changed, but roles and part types."""
        return replace(
            self,
            messages=_map_strings(self.messages, change),
            tools=_map_strings(self.tools, change),
            template_kwargs=_map_strings(self.template_kwargs, change),
        )


class ChatTemplate:
    """A compiled template. Raises ValueError when it does not compile."""

    def __init__(self, source: str, *, tool_source: str | None = None) -> None:
        self._template = _compile(source)
        self._tool_template = self._template if tool_source is None else _compile(tool_source)
        trees = [_ENVIRONMENT.parse(text) for text in (source, tool_source or "")]
        self.variables = frozenset().union(*map(jinja2.meta.find_undeclared_variables, trees))
        """Names that the template reads."""
        self.literal_text = "\0".join(literal for tree in trees for literal in _literals(tree))
        """The strings that the template writes itself."""
        self.takes_string = self._renders("probe-one\nprobe-two")
        """Renders `content` given as a string."""
        self.takes_parts = self._renders(
            [{"type": "text", "text": "probe-one"}, {"type": "text", "text": "probe-two"}]
        )
        """Renders `content` given as a list of parts."""

    @classmethod
    def load(
        cls, folder: Path, config: dict[str, Any], override: str | None = None
    ) -> ChatTemplate | None:
        """The template of a model folder, or None if it has none.

        `override` is a file or the template's text. Raises ValueError when it is neither, or when
        the template does not compile.
        """
        if override is not None:
            return cls(_read_override(override))
        named = _named_templates(folder, config)
        if not named:
            return None
        source = named.get("default") or next(iter(named.values()))
        return cls(source, tool_source=named.get("tool_use"))

    def render(self, request: ChatRequest, special_tokens: dict[str, str]) -> str:
        """The conversation as text. Raises ApiError when the template refuses the messages."""
        messages = [self._message(message) for message in request.messages]
        if request.continue_final_message:
            final = _tag_final(messages)
        context = {
            **special_tokens,
            **request.template_kwargs,
            "messages": messages,
            "tools": request.tools,
            "documents": None,
            "add_generation_prompt": request.add_generation_prompt,
        }
        try:
            rendered = self._generate(context, with_tools=bool(request.tools))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            message = f"The model's chat template refuses these messages: {str(error)[:200]}"
            raise ApiError("invalid_value", message, "messages") from error
        return _cut_at_tag(rendered, final) if request.continue_final_message else rendered

    def _generate(self, context: dict[str, Any], *, with_tools: bool) -> str:
        template = self._tool_template if with_tools else self._template
        clock = _Deadline(time.monotonic() + MAX_RENDER_S)
        pieces: list[str] = []
        size = 0
        for piece in template.generate(**context, **{_Deadline.KEY: clock}):
            size += len(piece)
            if size > MAX_RENDERED_CHARS:
                raise jinja2.TemplateRuntimeError(f"over {MAX_RENDERED_CHARS} characters")
            clock.check()
            pieces.append(piece)
        return "".join(pieces)

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as templates expect it: no nulls, content in a form this template renders."""
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, list) and not self.takes_parts:
            texts = [part["text"] for part in content if part.get("type") == "text"]
            message["content"] = "\n".join(texts)
        elif isinstance(content, str) and self.takes_parts and not self.takes_string:
            message["content"] = [{"type": "text", "text": content}]
        reasoning = next((message[k] for k in REASONING_FIELDS if k in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        return message

    def _renders(self, content: str | list[dict[str, str]]) -> bool:
        context = {
            "messages": [{"role": "user", "content": content}],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        try:
            rendered = self._generate(context, with_tools=False)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError):
            return False
        is_repr = "'text'" in rendered or '"text"' in rendered
        return "probe-one" in rendered and "probe-two" in rendered and not is_repr


class _Deadline:
    """When a rendering must be over."""

    KEY = "quire_deadline"

    def __init__(self, at: float) -> None:
        self._at = at

    def check(self) -> None:
        if time.monotonic() > self._at:
            raise jinja2.TemplateRuntimeError(f"over {MAX_RENDER_S:g} seconds")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also stops what runs too long or asks for too much memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[_Deadline.KEY].check()
        if any(isinstance(arg, int) and abs(arg) > MAX_TEMPLATE_INT for arg in args):
            raise jinja2.TemplateRuntimeError("a number is too large")
        return super().call(context, obj, *args, **kwargs)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if any(isinstance(side, int) and abs(side) > MAX_TEMPLATE_INT for side in (left, right)):
            raise jinja2.TemplateRuntimeError("a number is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the model says, for training; renders its body here."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` in templates, without the class's attributes to climb on."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own escapes HTML characters, which models were not trained on
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    return environment


_ENVIRONMENT = _environment()


def _compile(source: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error


def _literals(tree: jinja2.nodes.Template) -> Iterator[str]:
    for data in tree.find_all(jinja2.nodes.TemplateData):
        yield data.data
    for constant in tree.find_all(jinja2.nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


def _read_override(override: str) -> str:
    if any(mark in override for mark in ("{{", "{%", "\n")):
        return override
    path = Path(override)
    if not path.is_file():
        raise ValueError(f"chat template {override!r} is neither a file nor a Jinja template")
    return path.read_text(encoding="utf-8")


def _named_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; files win over tokenizer_config.json, as in transformers."""
    declared = config.get("chat_template")
    named: dict[str, str] = {}
    if isinstance(declared, str):
        named["default"] = declared
    elif isinstance(declared, list):
        named.update({entry["name"]: entry["template"] for entry in declared})
    main = folder / "chat_template.jinja"
    if main.is_file():
        named["default"] = main.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = path.read_text(encoding="utf-8")
    return named


def _tag_final(messages: list[dict[str, Any]]) -> str:
    """Append the tag to the last message's text, in place; the text. Raises ApiError if none."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_TAG
        return content
    if isinstance(content, list) and content and content[-1].get("type") == "text":
        text = str(content[-1]["text"])
        tagged = {**content[-1], "text": text + _CONTINUE_TAG}
        messages[-1]["content"] = [*content[:-1], tagged]
        return text
    message = "'continue_final_message' needs a text in the last message."
    raise ApiError("invalid_value", message, "continue_final_message")


def _cut_at_tag(rendered: str, final: str) -> str:
    at = rendered.rfind(_CONTINUE_TAG.strip())
    if at < 0 or final.strip() not in rendered:
        message = "The model's chat template does not render the last message as it is."
        raise ApiError("invalid_value", message, "continue_final_message")
    cut = rendered[:at]
    # a template that trims messages has trimmed the tag's space: trim what it would have trimmed
    return cut if rendered[at:].startswith(_CONTINUE_TAG) else cut.rstrip()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _WORDS:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key: item if key in _WORDS else _map_strings(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value
