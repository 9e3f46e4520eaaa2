"""Every code block of the README and of docs/ runs, against the server the document starts."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TIMEOUT_S = 120


def _load_blocks():
    spec = importlib.util.spec_from_file_location("blocks", ROOT / ".ci" / "blocks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["blocks"] = module
    spec.loader.exec_module(module)
    return module.blocks


blocks = _load_blocks()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """This interpreter's `quire` and `python` first in PATH; a folder to work in."""
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "TQDM_DISABLE": "1"}


def start_server(block, port: int, environment) -> subprocess.Popen:
    command = [*shlex.split(block.text), "--port", str(port)]
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return server
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not become ready")


@pytest.mark.parametrize("document", DOCUMENTS, ids=[p.name for p in DOCUMENTS])
def test_the_blocks_of_a_document_run(document, environment) -> None:
    port, server = free_port(), None
    try:
        for block in blocks(document):
            if block.role == "server":
                server = start_server(block, port, environment)
            elif block.role == "run" and block.language in ("bash", "python"):
                text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
                command = {"bash": ["bash", "-ec", text], "python": [sys.executable, "-c", text]}
                done = subprocess.run(
                    command[block.language], env=environment, timeout=TIMEOUT_S,
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                where = f"{document.name}:{block.line}"
                assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"
                assert done.stdout.strip(), f"{where} printed nothing"
                assert '"error"' not in done.stdout, f"{where}\n{done.stdout}"
    finally:
        if server is not None:
            server.terminate()
            server.wait(timeout=60)


@pytest.mark.parametrize("document", DOCUMENTS, ids=[p.name for p in DOCUMENTS])
def test_links_and_pictures_of_a_document_exist(document) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
