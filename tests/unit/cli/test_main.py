"""The command itself: dispatch, mistakes, and how little it costs to ask for help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quire
from quire.cli.docs import COMMANDS as DOCUMENTED
from quire.cli.docs import cli_page
from quire.cli.main import COMMANDS, main
from quire.config.base import field_docs, options_of

HEAVY = ("torch", "transformers", "numpy", "fastapi", "pydantic", "grpc", "uvicorn", "httpx2")
PROBE = """
import json, resource, sys
from quire.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
loaded = [name for name in {heavy} if name in sys.modules]
print(json.dumps({{"cpu": used.ru_utime + used.ru_stime, "loaded": loaded}}))
"""


def test_version_and_overview(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"quire {quire.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert name in text
        assert command.summary in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["srve"], "unknown command 'srve'; did you mean serve?"),
        (["collect_enw"], "did you mean collect-env?"),
        (["zzz"], "unknown command 'zzz'; see quire --help"),
        (
            ["bench", "latncy"],
            "quire bench: error: unknown command 'latncy'; did you mean latency?",
        ),
    ],
)
def test_an_unknown_command_names_the_nearest(capsys, argv, message):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_command_is_a_mistake_that_shows_the_overview(capsys):
    assert main([]) == 2
    assert "usage: quire COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--version"], ["--help"], ["serve", "--help"], ["serve", "--dump-config"],
        ["serve", "--prot", "1"], ["bench", "serve", "--help"], ["bench", "throughput", "--help"],
        ["chat", "--help"], ["complete", "--help"], ["top", "--help"], ["doctor", "--help"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_asking_for_help_is_cheap(argv):
    probe = PROBE.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", probe, *argv], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["loaded"] == []
    assert seen["cpu"] < 1.0, "0.1 s on an idle machine; the limit leaves room for a busy one"


def test_the_docs_page_is_current():
    page = Path(__file__).parents[3] / "docs" / "cli.md"
    assert page.read_text() == cli_page(), "run: python -m quire.cli.docs > docs/cli.md"


@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda c: c.prog)
def test_every_option_of_every_command_has_help(command):
    for owner in command.owners:
        docs = field_docs(owner)
        for o in options_of(owner):
            assert docs.get(o.name, "").endswith("."), f"{owner.__name__}.{o.name}"
