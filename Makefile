# Everything below sets up what it needs: .venv, dependencies, a release build of the extension. The second
# run of a target only repeats its own work; what is done is noted inside .venv, to go with it. Needed on PATH:
# python3 >= 3.11, cargo >= 1.88 and a C compiler.

PYTHON ?= python3
BIN    := .venv/bin
DONE   := .venv/.make
RUST   := Cargo.toml Cargo.lock $(shell find rust -type f \( -name '*.rs' -o -name '*.lua' -o -name Cargo.toml \))
EXTRAS := embedded,fastapi,celery,gevent,integrity,cli,archive,otel,pdf,export,privacy

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1
# Cargo by itself asks the first python3 on PATH, which may be too old for the extension's ABI.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo test lint chaos proofs bench docs build clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DONE)/built ## the main job on real servers; EVENTS=file.log imports that sshd log as well
	$(BIN)/dotmac demo --report demo-report $(if $(EVENTS),--events $(EVENTS))

# The Rust tests are built without optimisation, and so check for overflow. Measured on two cores after the
# extension's build, their run included: 100 s of processor time; with --release 190 s, for all that it shares.
test: $(DONE)/built ## all tests, Rust and Python, on real servers
	cargo test --quiet -p dotmac-core -p dotmac-engine
	cargo test --quiet -p dotmac-engine --features shuttle --lib concurrency
	$(BIN)/python tests/run.py

lint: $(DONE)/built ## formatting, lints, types, stubs, import direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest dotmac.platform._native
	$(BIN)/lint-imports
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	cargo clippy --quiet --all-targets -p dotmac-engine --features shuttle -- -D warnings

chaos: $(DONE)/built ## locks under random faults for SECONDS=60; SEED=n repeats; TOPOLOGY=standalone, sentinel or cluster
	PYTHONPATH=tests $(BIN)/python -m chaos.run $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(TOPOLOGY),--topology $(TOPOLOGY))

proofs: ## models of locks, leases and failover, checked by Spin; CASES="restart grace" only those
	$(PYTHON) docs/proofs/run.py $(CASES)

bench: $(DONE)/built $(DONE)/peers ## speed, and the same work by named peers; says what takes how long
	$(BIN)/python -m pytest benches/python -o 'python_files=bench_*.py' -o 'filterwarnings=' --benchmark-only
	$(BIN)/python benches/compare

docs: $(DONE)/built ## run every example in README and docs
	$(BIN)/python -m pytest tests/docs

build: $(DONE)/built ## .venv with everything, the extension built for release

clean: ## remove all that was made
	rm -rf .venv target dist demo-report .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks \
		.import_linter_cache python/dotmac/platform/_native*.so

$(DONE)/venv:
	$(PYTHON) -c 'import sys; sys.exit("python3 >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	@mkdir -p $(DONE) && touch $@

$(DONE)/tools: $(DONE)/venv pyproject.toml
	$(BIN)/pip install --quiet --group dev
	@touch $@

$(DONE)/peers: $(DONE)/tools
	$(BIN)/python benches/compare/install.py
	@touch $@

$(DONE)/built: $(DONE)/tools $(RUST) pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv" $(BIN)/maturin develop --quiet --release --extras $(EXTRAS)
	@touch $@
