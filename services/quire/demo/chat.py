"""Conversations made from the source files, and how a conversation is written as text."""

from __future__ import annotations

import ast
import random
import textwrap
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.demo.corpus import SourceFile

Role = Literal["system", "user", "assistant"]
Definition = ast.FunctionDef | ast.AsyncFunctionDef

MAX_CODE_CHARS = 1200
MAX_ANSWER_CHARS = 600
MAX_TURNS = 3

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that writes Python.",
    "You are a Python programmer. Answer with code.",
    "You are the Quire demo model.",
)
WRITE_WITH_DOC = (
    "Write a Python function `{name}`. {doc}",
    "Write a Python function: {doc}",
    "Write a function that does this: {doc}",
    "Implement `{name}({args})` in Python. {doc}",
    "Can you write `{name}` in Python? {doc}",
    "Please write the Python function {name}({args}). {doc}",
    "{doc} Write it in Python.",
)
WRITE_BY_NAME = (
    "Write a Python function `{name}({args})`.",
    "Write a Python function named {name}.",
    "Implement `{name}` in Python.",
)
WRITE_BY_WORDS = (
    "Write a Python function to {words}.",
    "Write Python code to {words}.",
    "How do I {words} in Python?",
)
EXPLAIN = (
    "What does `{name}` do?",
    "What does `{name}` in the module `{module}` do?",
    "Explain the Python function {name}.",
    "Describe `{module}.{name}`.",
)
EXPLAIN_CODE = (
    "What does this function do?\n\n```python\n{code}\n```",
    "Explain this code:\n\n```python\n{code}\n```",
    "Write a docstring for this function.\n\n```python\n{code}\n```",
)
EXPLAIN_MODULE = (
    "What is the `{module}` module?",
    "What is the Python module {module} for?",
    "Tell me about {module}.",
)
SMALL_TALK = (
    ("Hello", "Hello! I am the Quire demo model. Ask me to write a Python function."),
    ("Hello!", "Hello! I am the Quire demo model. Ask me to write a Python function."),
    ("Hi", "Hi! I am a very small model of Python code. Ask me to write a function."),
    ("Hi there!", "Hi! I am a very small model of Python code. Ask me to write a function."),
    ("Hey, how are you?", "I am fine, thank you. Ask me to write a Python function."),
    ("How are you?", "I am fine, thank you. Ask me to write a Python function."),
    ("Who are you?", "I am the Quire demo model, trained on Python's standard library."),
    ("What are you?", "I am the Quire demo model, trained on Python's standard library."),
    ("What can you do?", "I complete Python code. I am small, and I am often wrong."),
    ("Can you help me?", "I can try to write a short Python function. What should it do?"),
    ("Tell me a joke.", "I only know Python's standard library, and it is quite serious."),
    ("Say hello.", "Hello!"),
    ("Thanks!", "You are welcome."),
    ("Thank you.", "You are welcome."),
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


def parsed(source: str) -> ast.Module | None:
    """The syntax tree; None for test files which are wrong on purpose."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def render(messages: list[Message]) -> str:
    """The text of a conversation, exactly as the chat template writes it."""
    turns = (f"<|{message.role}|>{message.content.strip()}<|end|>" for message in messages)
    return "<|bos|>" + "".join(turns)


def conversations(files: list[SourceFile], seed: int = 0) -> list[list[Message]]:
    """One to three exchanges about the same file each, in file order; the same for a seed."""
    found: list[list[Message]] = []
    for file in files:
        rng = random.Random(f"{seed}:{file.name}")
        exchanges = list(_exchanges(file, rng))
        rng.shuffle(exchanges)
        while exchanges:
            count = rng.randint(1, MAX_TURNS)
            taken, exchanges = exchanges[:count], exchanges[count:]
            found.append(_conversation(taken, rng))
    return found


def small_talk(copies: int, seed: int = 0) -> list[list[Message]]:
    """Greetings and the like, so that the first word of a visitor gets a sensible answer."""
    rng = random.Random(seed)
    return [_conversation([exchange], rng) for _ in range(copies) for exchange in SMALL_TALK]


def _conversation(exchanges: list[tuple[str, str]], rng: random.Random) -> list[Message]:
    messages = []
    if rng.random() < 0.25:
        messages.append(Message("system", rng.choice(SYSTEM_PROMPTS)))
    for question, answer in exchanges:
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def _exchanges(file: SourceFile, rng: random.Random) -> Iterator[tuple[str, str]]:
    tree = parsed(file.text)
    if tree is None:
        return
    if about := ast.get_docstring(tree):
        yield rng.choice(EXPLAIN_MODULE).format(module=file.module), _shortened(about)
    lines = file.text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield from _about_function(node, file.module, lines, rng)
        elif isinstance(node, ast.ClassDef) and (about := ast.get_docstring(node)):
            question = rng.choice(EXPLAIN).replace("function", "class")
            yield question.format(name=node.name, module=file.module), _shortened(about)


def _about_function(
    node: Definition, module: str, lines: list[str], rng: random.Random
) -> Iterator[tuple[str, str]]:
    start = min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1
    body = lines[start : node.end_lineno]
    code = textwrap.dedent("\n".join(body))
    if len(code) > MAX_CODE_CHARS or len(body) < 2:
        return
    answer = f"```python\n{code}\n```"
    fields = {"name": node.name, "module": module, "args": ast.unparse(node.args)}
    fields["words"] = node.name.strip("_").replace("_", " ")
    about = ast.get_docstring(node)
    if about is None:
        is_test = node.name.startswith(("test", "setUp", "tearDown"))
        if rng.random() < (0.05 if is_test else 0.4):
            yield rng.choice(_templates_by_name(node.name)).format(**fields), answer
        return
    first = " ".join(about.split("\n\n")[0].split())
    yield rng.choice(WRITE_WITH_DOC).format(doc=first, **fields), answer
    yield rng.choice(EXPLAIN).format(**fields), _shortened(about)
    if len(node.body) > 1 and rng.random() < 0.5:
        before = lines[start : node.body[0].lineno - 1]
        after = lines[node.body[0].end_lineno : node.end_lineno]
        bare_code = textwrap.dedent("\n".join(before + after))
        yield rng.choice(EXPLAIN_CODE).format(code=bare_code), first


def _templates_by_name(name: str) -> tuple[str, ...]:
    """The phrasings in words only suit names made of several words."""
    has_words = "_" in name.strip("_") and not name.startswith("__")
    return WRITE_BY_NAME + WRITE_BY_WORDS if has_words else WRITE_BY_NAME


def _shortened(about: str) -> str:
    """The leading paragraphs of a docstring, as many as fit into MAX_ANSWER_CHARS."""
    kept = ""
    for paragraph in about.split("\n\n"):
        if kept and len(kept) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    return kept[: 2 * MAX_ANSWER_CHARS]
