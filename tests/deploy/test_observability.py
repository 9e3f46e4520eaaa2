"""Every query of a dashboard, an alert or a scaler, by a real Prometheus, over running pods.

`BOARD_PICTURES=docs/images pytest tests/deploy/test_observability.py` also draws the boards.
"""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import httpx2
import pytest
from manifests import EXAMPLES, RELEASE, render
from prometheus import Prometheus, scrape_configs

from quire.telemetry.grafana.alerts import alerts
from quire.telemetry.grafana.boards import BOARDS

LOAD_S = float(os.environ.get("LOAD_S", "12"))
CLIENTS = 3
WINDOW = "10s"
CONDITION = re.compile(r" (==|>|<) [\d.]+(?=\)?$)")
"""Of an alert: left off, what is judged must be there."""
SHARE = re.compile(r" < [\d.]+ \* ")
"""Between two numbers that an alert compares."""


def client(release, number: int, until: float) -> None:
    """Asks again and again: chats that begin alike, of different lengths, streamed and not."""
    url = release.of("gateway")[0].url("http", "/v1/chat/completions")
    key = release.secret(f"{RELEASE}-quire-api-key", "api-key")
    with httpx2.Client(timeout=60, headers={"Authorization": f"Bearer {key}"}) as session:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            topic = f"Write function {turn} of {number}. " * (4 + turn % 5 * 8)
            body = {
                "model": "demo", "max_tokens": 24, "stream": turn % 3 > 0,
                "messages": [{"role": "system", "content": "You write Python. " * 20},
                             {"role": "user", "content": topic}],
            }  # fmt: skip
            session.post(url, json=body).raise_for_status()


@pytest.fixture(scope="module")
def prometheus(release, tmp_path_factory):
    """After some seconds of load."""
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus(scrape_configs(release), folder) as running:
        until = time.monotonic() + LOAD_S
        threads = [
            threading.Thread(target=client, args=(release, n, until)) for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        running.loaded_until = time.time()
        yield running


def as_grafana_asks(expression: str) -> str:
    """With the variables at All."""
    asked = expression.replace("$__rate_interval", WINDOW)
    return re.sub(r"\$(job|instance|model)\b", ".*", asked)


def test_what_does_not_exist_is_empty(prometheus) -> None:
    """The tests below see what they are for."""
    assert not prometheus.query("sum(rate(quire_steps[10s]))"), "the counter's name lacks _total"
    assert not prometheus.query('max(quire_kv_blocks{state="used"})')


def test_every_pod_is_scraped(release, prometheus) -> None:
    health = prometheus.targets()
    assert len(health) == len(release.pods)
    assert set(health.values()) == {"up"}


@pytest.mark.parametrize("board", BOARDS, ids=[board.uid for board in BOARDS])
def test_no_panel_is_empty(prometheus, board) -> None:
    empty = [
        f"{panel.title}: {query.expr}"
        for row in board.rows
        for panel in row.panels
        for query in panel.queries
        if not prometheus.query(as_grafana_asks(query.expr))
    ]
    assert not empty


@pytest.mark.parametrize("board", BOARDS, ids=[board.uid for board in BOARDS])
def test_variables_have_choices(prometheus, board) -> None:
    for variable in board.json()["templating"]["list"][1:]:
        metric, label = re.fullmatch(
            r"label_values\((.+), (\w+)\)", variable["query"]["query"]
        ).groups()
        found = prometheus.query(as_grafana_asks(metric))
        assert {sample["metric"].get(label) for sample in found} - {None}, variable


def test_what_alerts_judge_is_there(prometheus) -> None:
    for alert in alerts():
        parts = SHARE.split(alert.expr.replace("[5m]", f"[{WINDOW}]"))
        found = [prometheus.query(CONDITION.sub("", part)) for part in parts]
        assert all(found), alert.name
        of = {tuple(sorted(str(each["metric"]) for each in samples)) for samples in found}
        assert len(of) == 1, f"{alert.name} compares what has other labels"
    rules = prometheus.get("/api/v1/rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}


def test_scalers_find_their_numbers(prometheus) -> None:
    path = next(path for path in EXAMPLES if path.stem == "autoscaled")
    rendered = render(path)
    queries = [
        trigger["metadata"]["query"]
        for scaled in rendered.of("ScaledObject")
        for trigger in scaled["spec"]["triggers"]
    ]
    for scaler in rendered.of("HorizontalPodAutoscaler"):
        name = scaler["spec"]["scaleTargetRef"]["name"]
        queries += [
            f'{metric["pods"]["metric"]["name"]}{{namespace="models",pod=~"{name}-[0-9]+"}}'
            for metric in scaler["spec"]["metrics"]
            if metric["type"] == "Pods"
        ]
    assert len(queries) >= 4
    for query in queries:
        found = prometheus.query(query)
        assert len(found) == 1 if query.startswith("sum(") else found, query


@pytest.mark.skipif("BOARD_PICTURES" not in os.environ, reason="draws pictures for docs/")
def test_boards_are_drawn(prometheus) -> None:
    from board_pictures import draw

    end = prometheus.loaded_until
    for board in BOARDS:
        draw(
            board,
            lambda expr: prometheus.range(as_grafana_asks(expr), end - LOAD_S, end, 1),
            Path(os.environ["BOARD_PICTURES"]) / f"board-{board.uid.removeprefix('quire-')}.png",
        )
