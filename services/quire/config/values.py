"""Texts of flags, environment variables and YAML values turned into numbers, truths and lists."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Scalar = str | int | float | bool

_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+))\s*([kKmMgGtT]?)(i?)([bB]?)")
_POWER: dict[str, int] = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the person who wrote it."""


def parse_int(text: str) -> int:
    """An integer, maybe with a suffix: K, M, G, T are powers of 1024, k, m, g, t of 1000.

    This is vLLM's reading (`32K` is 32768, `32k` is 32000). `Ki`, `KiB` and `kB` work too, and a
    fraction does when the result is whole. Raises ValueError.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"an integer such as 4096, 32K or 4G is needed, not {text!r}")
    digits, suffix, binary, _ = match.groups()
    if binary and not suffix:
        raise ValueError(f"an integer such as 4096, 32K or 4G is needed, not {text!r}")
    base = 1024 if suffix.isupper() or binary else 1000
    whole, _, fraction = digits.replace("_", "").partition(".")
    scaled: int = int(whole + fraction or "0") * base ** _POWER[suffix.lower()]
    unit: int = 10 ** len(fraction)
    value, rest = divmod(scaled, unit)
    if rest or (fraction and not suffix):
        raise ValueError(f"{text!r} is not a whole number")
    return value


def parse_float(text: str) -> float:
    """A finite number. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"a number is needed, not {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"a finite number is needed, not {text!r}")
    return value


def parse_bool(text: str) -> bool:
    """1, true, yes, on or their opposites, in any case. Raises ValueError."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"true or false is needed, not {text!r}")


def parse_scalar(kind: type[Scalar], text: str) -> Scalar:
    """A text as one of str, int, float, bool. Raises ValueError."""
    if kind is bool:
        return parse_bool(text)
    if kind is int:
        return parse_int(text)
    if kind is float:
        return parse_float(text)
    return text


def check_scalar(kind: type[Scalar], value: object) -> Scalar:
    """A value that already has a type, from YAML, JSON or Python. Raises ValueError.

    Numbers may be written as text, so that `4G` works in YAML. A number where text is expected is
    an error: YAML reads a revision 1.10 as 1.1.
    """
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return _finite(value)
    if isinstance(value, str):
        return parse_scalar(kind, value)
    wanted = {str: "text (put it in quotes)", int: "an integer", float: "a number", bool: "a truth"}
    raise ValueError(f"{wanted[kind]} is needed, not {value!r}")


def _finite(value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a finite number is needed, not {value}")
    return value


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like this one, if any is alike."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known word is alike."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""
