# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := build/peers-venv

.PHONY: demo consortium test lint bench bench-peers venv clean

demo: venv  ## the main job: hospitals train and match with one command
	$(BIN)/fedgestalt demo

consortium: venv  ## a provisioned consortium on this machine: train, match, add a hospital
	$(BIN)/fedgestalt consortium

test: venv  ## all tests: the fast ones in parallel, then those that start FLARE's processes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not federation"
	$(BIN)/python -m pytest -p no:xdist -m federation

lint: venv  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: venv  ## performance claims, as ratios
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -p no:xdist

bench-peers: $(PEERS)/.installed  ## the same against Flower and TenSEAL, in their own environment
	$(PEERS)/bin/python -m pytest tests/benchmarks/test_secagg.py -k against --benchmark-only

$(PEERS)/.installed: pyproject.toml tests/benchmarks/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/benchmarks/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
