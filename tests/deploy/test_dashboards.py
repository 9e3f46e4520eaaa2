"""Dashboards and alerts as files; tests/deploy/test_observability.py runs their queries."""

from __future__ import annotations

import json
import subprocess
from itertools import combinations

import pytest
import yaml
from manifests import ROOT, tool

from quire.telemetry import metrics as m
from quire.telemetry.grafana.__main__ import files
from quire.telemetry.grafana.alerts import alerts
from quire.telemetry.grafana.boards import BOARDS
from quire.telemetry.grafana.queries import Source

UNITS = {
    "s", "reqps", "percentunit", "bytes", "Bps", "short", "ops", "count:tok/s",
}  # fmt: skip
ALERTS = ROOT / "grafana" / "alerts.yaml"


@pytest.fixture(params=BOARDS, ids=[board.uid for board in BOARDS])
def board(request) -> dict:
    return request.param.json()


def shown(board: dict) -> list[dict]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_generated_files_are_current_and_no_others_are_there() -> None:
    made = files(ROOT)
    for path, content in made.items():
        assert path.read_text() == content, "run: python -m quire.telemetry.grafana ."
    for folder in ("grafana/dashboards", "helm/quire/files/dashboards"):
        assert set((ROOT / folder).iterdir()) == {p for p in made if p.parent == ROOT / folder}


def test_panels_have_numbers_of_their_own_and_do_not_overlap(board) -> None:
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))
    places = [panel["gridPos"] for panel in board["panels"]]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_a_board_works_with_whatever_data_source_and_labels(board) -> None:
    text = json.dumps(board)
    assert "__inputs" not in text
    assert len(board["uid"]) <= 40
    assert board["templating"]["list"][0]["name"] == "datasource"
    known = {v["name"] for v in board["templating"]["list"]}
    for panel in shown(board):
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert "$job" in target["expr"]
            for name in ("job", "instance", "model"):
                assert f"${name}" not in target["expr"] or name in known
            if "[" in target["expr"]:
                assert "[$__rate_interval]" in target["expr"]


def test_a_panel_says_its_unit_and_its_metrics(board) -> None:
    titles = [panel["title"] for panel in shown(board)]
    assert len(titles) == len(set(titles))
    for panel in shown(board):
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert "Metrics: quire_" in panel["description"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) >= 1


def test_a_label_that_a_metric_has_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="quire_steps has no label reason"):
        Source().rate(m.STEPS, "reason")
    with pytest.raises(ValueError, match=r"no bucket up to 0\.33"):
        Source().share_within(0.33, m.GATEWAY_TIME_TO_FIRST_TOKEN)


def test_every_alert_has_a_runbook() -> None:
    pages = (ROOT / "docs" / "runbooks.md").read_text()
    for alert in alerts():
        assert f"\n## {alert.name}\n" in pages
    assert pages.count("\n## ") == len(alerts())


def promtool(*args: str) -> None:
    done = subprocess.run(
        [tool("promtool"), *args], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_the_rules() -> None:
    promtool("check", "rules", str(ALERTS))


def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    cases = ROOT / "tests" / "deploy" / "alerts_test.yaml"
    promtool("test", "rules", str(cases))
    tested = {
        case["alertname"]
        for test in yaml.safe_load(cases.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert tested == {alert.name for alert in alerts()}
