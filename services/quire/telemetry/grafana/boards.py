"""The dashboards. What is on one is there to be read together."""

from __future__ import annotations

from quire.telemetry.grafana.cluster import disaggregation, router
from quire.telemetry.grafana.engines import engine, start
from quire.telemetry.grafana.overview import overview

BOARDS = (overview(), engine(), disaggregation(), router(), start())
