# Each target makes .venv from nothing when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: help demo serve-examples test test-clients test-big lint format proto bench peers soak conformance deploy-check clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY) ## Train a digit classifier through a server, in under two minutes; writes out/demo.png
	$(BIN)/python examples/digits_demo.py

serve-examples: $(READY) ## Every model of examples/models on localhost:8470: what the gallery (docs/gallery.md) runs against
	$(BIN)/pullback-server serve --threads 1 --repository examples/models examples/models/*.py

# Triton's client needs an older protobuf than ours, and its descriptors have the names of some of ours.
.venv-triton/.ready:
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install -q --disable-pip-version-check 'tritonclient[grpc]==2.73.0'
	touch $@

# Where there is no npm, the test of the client in JavaScript is skipped.
examples/node/node_modules/.ready: examples/node/package-lock.json
	if command -v npm > /dev/null; then cd examples/node && npm ci --no-audit --no-fund --loglevel=error --ignore-scripts && touch node_modules/.ready; fi

test: $(READY) .venv-triton/.ready examples/node/node_modules/.ready ## The whole quick suite
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

conformance: $(READY) ## Checks that the server at TARGET keeps the contract, e.g. make conformance TARGET=localhost:8470
	$(BIN)/python -m pullback.conformance $(TARGET)

soak: $(READY) ## Minutes of overload, floods and killed workers; prints figures, fails where one is not met
	$(BIN)/python benchmarks/soak.py

clean: ## Remove environments, caches and outputs
	rm -rf $(VENV) .venv-* out examples/node/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
