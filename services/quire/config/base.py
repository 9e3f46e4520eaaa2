"""What every config has: its fields as options, checked values, construction from a mapping."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from dataclasses import MISSING, Field, asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from quire.config.option import METADATA_KEY, Spelling
from quire.config.values import ConfigError, Scalar, check_scalar, did_you_mean, parse_scalar
from quire.config.vllm import IGNORED, REFUSED, judge

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

ENV_PREFIX = "QUIRE_"


@dataclass(frozen=True)
class Option:
    """One field of a config class, as flag, environment variable and YAML key."""

    owner: type[Any]
    name: str
    kind: type[Scalar]
    """Type of the value, or of each value of a list."""
    many: bool
    """A list; the field holds a tuple."""
    optional: bool
    """None is a value."""
    default: object
    spelling: Spelling

    @property
    def flags(self) -> tuple[str, ...]:
        """`--max-model-len` first, then other spellings."""
        names = (self.name, *self.spelling.aliases)
        return tuple(n if n.startswith("-") else "--" + n.replace("_", "-") for n in names)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names in Python and YAML, with underscores: the field's, then other spellings."""
        return (self.name, *(a for a in self.spelling.aliases if not a.startswith("-")))

    @property
    def variables(self) -> tuple[str, ...]:
        """Environment variables: the field's, then other spellings."""
        return tuple(ENV_PREFIX + key.upper() for key in self.keys)

    def parse(self, text: str) -> object:
        """The value of a flag or variable; a variable's list is separated by commas.

        Raises ValueError.
        """
        if self.many:
            parts = (part.strip() for part in text.split(","))
            return tuple(parse_scalar(self.kind, part) for part in parts if part)
        return self._choose(parse_scalar(self.kind, text))

    def check(self, value: object) -> object:
        """A value from YAML, JSON or Python as the field's type. Raises ValueError."""
        if value is None and self.optional:
            return None
        if self.many:
            listed = value if isinstance(value, list | tuple) else [value]
            return tuple(check_scalar(self.kind, v) for v in listed)
        return self._choose(check_scalar(self.kind, value))

    def _choose(self, value: Scalar) -> Scalar:
        choices = self.spelling.choices
        if choices and value not in choices:
            hint = did_you_mean(str(value), choices)
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}{hint}")
        return value


_known: dict[type[Any], tuple[Option, ...]] = {}


def options_of(owner: type[Any]) -> tuple[Option, ...]:
    """The options of a config class, in order. Raises TypeError on a field it cannot express."""
    if owner not in _known:
        hints = get_type_hints(owner)
        _known[owner] = tuple(_option(owner, f, hints[f.name]) for f in fields(owner))
    return _known[owner]


def _option(owner: type[Any], f: Field[Any], hint: Any) -> Option:
    optional = False
    if get_origin(hint) in (types.UnionType, Union):
        inner = [a for a in get_args(hint) if a is not type(None)]
        optional = len(inner) < len(get_args(hint))
        hint = inner[0]
    many = get_origin(hint) is tuple
    kind = get_args(hint)[0] if many else hint
    if kind not in (str, int, float, bool) or f.default is MISSING:
        raise TypeError(
            f"{owner.__name__}.{f.name}: a flag cannot express {hint} or has no default"
        )
    spelling = f.metadata.get(METADATA_KEY) or Spelling(owner.__name__)
    return Option(owner, f.name, kind, many, optional, f.default, spelling)


def field_docs(owner: type[Any]) -> dict[str, str]:
    """Field name -> the string under it, on one line. Empty where the source is not shipped."""
    docs: dict[str, str] = {}
    for cls in reversed(owner.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except OSError:
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, following in pairwise(body):
            match statement, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs


def check_fields(config: Any) -> None:
    """Raise ValueError naming the first field whose value has the wrong type or is no choice.

    For `__post_init__`: a config built in Python is checked as one from flags is. Lists become
    tuples.
    """
    for o in options_of(type(config)):
        try:
            value = o.check(getattr(config, o.name))
        except ValueError as error:
            raise ValueError(f"{o.name}: {error}") from None
        object.__setattr__(config, o.name, value)


def from_mapping(owner: type[T], values: Mapping[str, object]) -> T:
    """A config from keyword arguments or JSON, with `-` or `_` in keys, and vLLM's spellings.

    Raises ConfigError on an unknown key, naming the closest one, and on a bad value.
    """
    by_key = {key: o.name for o in options_of(owner) for key in o.keys}
    chosen: dict[str, object] = {}
    for given, value in values.items():
        key = given.replace("-", "_")
        if key in IGNORED or key in REFUSED:
            judge(key, value)
            continue
        if key not in by_key:
            raise ConfigError(f"unknown option {given!r}{did_you_mean(key, by_key)}")
        if by_key[key] in chosen:
            raise ConfigError(f"{by_key[key]} is given twice")
        chosen[by_key[key]] = value
    try:
        return owner(**chosen)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def to_mapping(config: Any) -> dict[str, Any]:
    """The fields as JSON can hold them. Secrets are in it: for another process, not for a log."""
    return asdict(config)
