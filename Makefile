# Each target makes .venv from nothing when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: help demo test test-clients test-big lint format proto bench peers soak deploy-check clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY) ## Train a digit classifier through a server, in under two minutes; writes out/demo.png
	$(BIN)/python examples/digits_demo.py

test: $(READY) ## The whole quick suite
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not big and not slow and not gpu" --ignore tests/deploy

test-clients: $(READY) ## Client and wire tests in clean environments without torch, on protobuf 6 and 7
	sh tests/clients.sh

test-big: $(READY) ## Tests that need gigabytes or minutes
	$(BIN)/python -m pytest -m "big or slow"

lint: $(READY) ## Format, style, types, import rules, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos

format: $(READY) ## Bring the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: ## Generate Python from the .proto files
	PYTHON=$(PYTHON) bash protos/generate.sh

bench: $(READY) ## Every figure that the README claims
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/sessions.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/cold.py
	$(BIN)/python benchmarks/peers.py

peers: $(READY) ## The same VJP on Pullback and its peers, each in an environment of its own; writes benchmarks/peers/
	$(BIN)/python benchmarks/peers.py

# checkov pins much of what it uses, so it gets an environment of its own.
.venv-deploy/.ready:
	test -x .venv-deploy/bin/python || $(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install -q --disable-pip-version-check checkov==3.3.30
	touch $@

deploy-check: $(READY) .venv-deploy/.ready ## Everything in deploy/ against kustomize, schemas, promtool, hadolint and checkov
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/deploy

soak: $(READY) ## Minutes of overload, floods and killed workers; prints figures, fails where one is not met
	$(BIN)/python benchmarks/soak.py

clean: ## Remove environments, caches and outputs
	rm -rf $(VENV) .venv-* out .mypy_cache .ruff_cache .pytest_cache .hypothesis
