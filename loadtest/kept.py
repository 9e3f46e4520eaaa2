"""Results that are kept: OUT.json, and OUT.txt for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a result was measured with: the options, the model by its folder's name."""
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    return settings | {"model": Path(options.model).name}


def keep(out: Path | None, data: dict[str, Any], text: str | None = None) -> None:
    """Write what was measured beside `out`, if anywhere."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    if text is not None:
        out.with_suffix(".txt").write_text(text.rstrip("\n") + "\n")
