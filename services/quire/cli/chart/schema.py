"""JSON Schema of values, and of the options of config classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.config.base import field_docs, options_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from quire.config.base import Option

Schema = dict[str, Any]

SIZE_PATTERN = r"^\d[\d_]*(\.\d+)?\s*([kKmMgGtT]i?[bB]?)?$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"


def block(text: str, **properties: Schema) -> Schema:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "description": text,
        "additionalProperties": False,
        "properties": properties,
    }


def free(text: str, of: Schema | None = None) -> Schema:
    """An object whose keys are the user's or Kubernetes' own."""
    return {"type": "object", "description": text, "additionalProperties": of or True}


def text(about: str, *choices: str) -> Schema:
    """A text, or one of the choices."""
    return {"type": "string", "description": about} | ({"enum": list(choices)} if choices else {})


def flag(about: str) -> Schema:
    """A truth."""
    return {"type": "boolean", "description": about}


def whole(about: str, least: int = 0, *, optional: bool = False) -> Schema:
    """An integer of at least `least`, or null."""
    kind: Any = ["integer", "null"] if optional else "integer"
    return {"type": kind, "description": about, "minimum": least}


def number(about: str) -> Schema:
    """A number above 0."""
    return {"type": "number", "description": about, "exclusiveMinimum": 0}


def many(about: str, of: Schema) -> Schema:
    """A list."""
    return {"type": "array", "description": about, "items": of}


def labels(about: str) -> Schema:
    """Texts by name."""
    return free(about, {"type": "string"})


def options(about: str, *owners: type[Any], except_for: Collection[str] = ()) -> Schema:
    """An object whose keys are the options of config classes, but for those the chart sets.

    Raises ValueError when `except_for` names none of them.
    """
    found: dict[str, Schema] = {}
    names = set()
    for owner in owners:
        docs = field_docs(owner)
        for o in options_of(owner):
            names.add(o.name)
            if o.name not in except_for:
                found[o.name] = _option(o, docs[o.name])
    if unknown := set(except_for) - names:
        raise ValueError(f"no such options: {', '.join(sorted(unknown))}")
    return block(about, **found)


def _option(o: Option, about: str) -> Schema:
    one = _scalar(o)
    schema: Schema = {"type": "array", "items": one} if o.many else one
    if o.optional:
        schema = {"anyOf": [schema, {"type": "null"}]}
    return {"description": about} | schema


def _scalar(o: Option) -> Schema:
    if o.spelling.choices:
        return {"enum": list(o.spelling.choices)}
    if o.kind is int:
        return {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": SIZE_PATTERN}]}
    return {"type": {str: "string", float: "number", bool: "boolean"}[o.kind]}
