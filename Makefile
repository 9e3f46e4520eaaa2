PYTHON ?= python

.PHONY: proto lint test
proto:  ## regenerate services/quire/proto from proto/*.proto
	$(PYTHON) -m grpc_tools.protoc -Iquire/proto=proto --python_out=services --mypy_out=services \
	  --grpc_python_out=services --mypy_grpc_out=services $(patsubst %,quire/%,$(wildcard proto/*.proto))

lint:
	ruff check . && ruff format --check . && mypy && lint-imports

test:
	pytest
