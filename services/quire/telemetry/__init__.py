"""Metrics and logs: every Prometheus name is declared in `quire.telemetry.metrics`, once."""
