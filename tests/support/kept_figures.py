"""What slow tests measure: printed, and kept where KEEP_FIGURES says.

`KEEP_FIGURES=loadtest/results/ray_fleet pytest -m slow ...` writes that file's .json, and .txt for
people. A test that runs again replaces its own figures and no others.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from loadtest.kept import keep

VARIABLE = "KEEP_FIGURES"

_shown: dict[str, list[dict[str, Any]]] = {}
"""Of this run, by test."""


def show(what: str, **values: float) -> None:
    """Of the test that runs. A name's end is the unit: `_s` seconds, `_mb` megabytes, else none."""
    row = {"what": what, **{name: round(value, 2) for name, value in values.items()}}
    print(_line(row))
    test = _current_test()
    _shown.setdefault(test, []).append(row)
    if VARIABLE in os.environ:
        _keep(Path(os.environ[VARIABLE]), test)


def _keep(out: Path, test: str) -> None:
    path = out.with_suffix(".json")
    before = json.loads(path.read_text())["tests"] if path.exists() else {}
    tests = dict(sorted((before | {test: _shown[test]}).items()))
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}"
    lines = [f"{machine}; other work may share the machine"]
    for name, rows in tests.items():
        lines += ["", name, *("  " + _line(row) for row in rows)]
    keep(out, {"machine": machine, "tests": tests}, "\n".join(lines))


def _current_test() -> str:
    """As a sentence: `ray fleet: a killed engine costs no request and comes back`."""
    path, name = os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0].split("::", 1)
    module, test = Path(path).stem, name.replace("::", " ")
    return f"{module.removeprefix('test_')}: {test.removeprefix('test_')}".replace("_", " ")


def _line(row: dict[str, Any]) -> str:
    values = (_shown_value(name, value) for name, value in row.items() if name != "what")
    return f"{row['what']}: {', '.join(values)}"


def _shown_value(name: str, value: float) -> str:
    if name.endswith("_s"):
        return f"{name[:-2].replace('_', ' ')} {value:.1f} s"
    if name.endswith("_mb"):
        return f"{name[:-3].replace('_', ' ')} {value:.0f} MB"
    return f"{name.replace('_', ' ')} {value:g}"
