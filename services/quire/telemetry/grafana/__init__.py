"""Dashboards and alerts, made of the metrics' declarations: no name is written twice."""
