PYTHON ?= python

.PHONY: proto generated lint test
proto:  ## regenerate services/quire/proto from proto/*.proto
	$(PYTHON) -m grpc_tools.protoc -Iquire/proto=proto --python_out=services --mypy_out=services \
	  --grpc_python_out=services --mypy_grpc_out=services $(patsubst %,quire/%,$(wildcard proto/*.proto))

generated:  ## what is written from declarations: references, the chart's schema, dashboards, alerts
	$(PYTHON) -m quire.cli.docs > docs/cli.md
	$(PYTHON) -m quire.telemetry.docs > docs/metrics.md
	$(PYTHON) -m quire.cli.chart helm/quire
	$(PYTHON) -m quire.telemetry.grafana .

lint:
	ruff check . && ruff format --check . && mypy && lint-imports

test:
	pytest
