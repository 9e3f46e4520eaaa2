"""How a config field says what its flag looks like.

A config is a frozen, keyword-only dataclass. Its field's name is the flag's name, the string under
the field is its help, and `option` adds what neither can say: the group in `--help`, other
spellings, the choices. `quire.config.schema` reads these declarations, nothing repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

METADATA_KEY = "quire.option"


@dataclass(frozen=True)
class Spelling:
    """What `option` records about a field."""

    group: str
    aliases: tuple[str, ...] = ()
    """Other names of the field, without dashes in front: ("gpu_memory_utilization", "-tp")."""
    choices: tuple[str, ...] = ()
    secret: bool = False
    """Masked when shown; never in `repr`."""


def option(
    default: T,
    group: str,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> T:
    """A dataclass field with a default and the extras of its flag. The default is immutable."""
    spelling = Spelling(group, aliases, choices, secret)
    return field(default=default, repr=not secret, metadata={METADATA_KEY: spelling})
