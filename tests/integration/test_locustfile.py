"""The locustfile, run by a real Locust where one is installed (in an environment of its own)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from server import running_server

ROOT = Path(__file__).parents[2]
LOCUST = os.environ.get("QUIRE_LOCUST") or shutil.which("locust")


@pytest.mark.skipif(LOCUST is None, reason="no locust on PATH; QUIRE_LOCUST may name one")
def test_locust_plays_a_scenario_and_sees_first_tokens(tmp_path) -> None:
    scenario = tmp_path / "small.yaml"
    scenario.write_text("requests: [{name: talk, input_len: 8, output_len: 6, turns: 2}]\n")
    environ = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'services'}",
        "QUIRE_SCENARIO": str(scenario),
    }
    with running_server("--max-model-len", "512") as server:
        done = subprocess.run(
            [
                LOCUST, "-f", ROOT / "loadtest/locustfile.py", "--headless", "--host", server.url,
                "--users", "2", "--spawn-rate", "10", "--run-time", "3s", "--csv", tmp_path / "out",
            ],
            env=environ, timeout=120, capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stats = (tmp_path / "out_stats.csv").read_text()
    for kind in ("POST,talk", "TTFT,talk", "ITL,talk"):
        assert f"\n{kind}," in stats, stats
