"""Panels and their places, as Grafana's JSON (schema 39: Grafana 10.4 and later)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from quire.telemetry.metrics import DECLARATIONS

Json = dict[str, Any]

SCHEMA_VERSION = 39
WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TILE_HEIGHT = 4
GRAPH_HEIGHT = 8
SOFT_FILL = 8
GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True)
class Query:
    """One line, or one per value of the labels in the legend."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """Something to see: its title, unit, and what is asked for."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    about: str = ""
    limits: tuple[float, float] | None = None
    """From where a tile is yellow, and red; red first when less is worse."""
    stacked: bool = False

    @property
    def metrics(self) -> list[str]:
        """Declared names in the queries, in order."""
        asked = " ".join(query.expr for query in self.queries)
        words = set(re.findall(r"[a-z_]+", asked))
        return [
            d.exported_names[0]
            for d in DECLARATIONS
            if {d.exported_names[0] + s for s in ("", "_bucket", "_sum", "_count")} & words
        ]


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """A dashboard."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]
    model_variable: bool = True

    def json(self) -> Json:
        """As Grafana imports it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.about,
            "tags": ["quire"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "",
            "annotations": {"list": []},
            "links": [_LINKS],
            "templating": {"list": _variables(model=self.model_variable)},
            "panels": _Layout().place(self.rows),
        }


_LINKS: Json = {
    "title": "Quire",
    "type": "dashboards",
    "tags": ["quire"],
    "asDropdown": True,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
}


def _variables(*, model: bool) -> list[Json]:
    chain = [("job", "Job", "label_values(quire_build_info, job)")]
    if model:
        chain = [
            ("job", "Job", "label_values(quire_model_info, job)"),
            ("model", "Model", 'label_values(quire_model_info{job=~"$job"}, model_name)'),
        ]
    source = "quire_model_info" if model else "quire_build_info"
    chain.append(("instance", "Instance", f'label_values({source}{{job=~"$job"}}, instance)'))
    chosen = {"text": "All", "value": "$__all"}
    first: Json = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "options": [],
        "refresh": 1,
        "regex": "",
    }
    return [first] + [
        {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": query, "refId": "A"},
            "definition": query,
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": chosen,
            "sort": 1,
            "hide": 0,
            "options": [],
            "regex": "",
        }
        for name, label, query in chain
    ]


@dataclass
class _Layout:
    """Left to right, then down."""

    panels: list[Json] = field(default_factory=list)
    x: int = 0
    y: int = 0
    height: int = 0

    def place(self, rows: tuple[Row, ...]) -> list[Json]:
        for row in rows:
            self._down()
            self._add(
                {"type": "row", "title": row.title, "collapsed": False, "panels": []}, WIDTH, 1
            )
            for panel in row.panels:
                tall = TILE_HEIGHT if panel.kind == "stat" else GRAPH_HEIGHT
                self._add(_panel(panel), panel.width, tall)
        return self.panels

    def _add(self, json: Json, width: int, height: int) -> None:
        if self.x + width > WIDTH:
            self._down()
        place = {"x": self.x, "y": self.y, "w": width, "h": height}
        self.panels.append({"id": len(self.panels) + 1, "gridPos": place} | json)
        self.x += width
        self.height = max(self.height, height)

    def _down(self) -> None:
        self.x, self.y, self.height = 0, self.y + self.height, 0


def _panel(panel: Panel) -> Json:
    names = ", ".join(panel.metrics)
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "instant": panel.kind in ("stat", "table"),
            "range": panel.kind not in ("stat", "table"),
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for number, query in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": f"{panel.about} Metrics: {names}.".strip(),
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel.kind),
    }


def _defaults(panel: Panel) -> Json:
    steps: list[Json] = [{"color": GREEN, "value": None}]
    if panel.limits is not None:
        first, second = panel.limits
        if first < second:
            steps += [{"color": YELLOW, "value": first}, {"color": RED, "value": second}]
        else:
            steps = [
                {"color": RED, "value": None},
                {"color": YELLOW, "value": second},
                {"color": GREEN, "value": first},
            ]
    defaults: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries":
        mode = "normal" if panel.stacked else "none"
        defaults["custom"] = {
            "fillOpacity": SOFT_FILL if not panel.stacked else 40,
            "stacking": {"mode": mode, "group": "A"},
            "showPoints": "never",
        }
        defaults["min"] = 0
    return defaults


def _options(kind: str) -> Json:
    if kind == "stat":
        reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": reduce, "colorMode": "background", "graphMode": "none"}
    if kind == "timeseries":
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {}
