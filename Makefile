# `make` lists the commands. Each makes the environment it needs (.venv) on its first run.

# An interpreter of your own: make PYTHON=/path/to/python3.11 test
PYTHON ?=
VENV ?= .venv
WORKERS ?= 2
JOBS ?= 2

BIN := $(VENV)/bin/python
VENV_MADE := $(VENV)/.made
CHECKS_INSTALLED := $(VENV)/.checks-installed
NOTEBOOKS_INSTALLED := $(VENV)/.notebooks-installed
DEV_INSTALLED := $(VENV)/.dev-installed
BENCH_INSTALLED := $(VENV)/.bench-installed
INSTALL := $(BIN) -m pip install --disable-pip-version-check -c constraints.txt
# The test problems are small: threads inside a worker cost more than they give.
PYTEST := OMP_NUM_THREADS=1 $(BIN) -m pytest
# Each worker begins with a part of the files, so that what a module computes once is computed once;
# who is done early takes over from the others.
PARALLEL := -n $(WORKERS) --dist worksteal
# Seconds; a whole notebook is to stay below two minutes.
CELL_LIMIT := 110
# Neither times, nor versions, nor the pieces in which a stream happened to arrive.
WITHOUT_CHANCE := --ExecutePreprocessor.record_timing=False \
	--NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor \
	--ClearMetadataPreprocessor.enabled=True \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help verify verify-paper test test-slow test-gpu test-packaging lint format typecheck \
	notebooks test-notebooks write-notebooks bench clean distclean

help: ## List the commands
	@echo "ode-stopping: make COMMAND"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON (interpreter, 3.11 or newer), VENV, WORKERS (pytest), JOBS (checks)"

verify: $(CHECKS_INSTALLED) ## Check the theorems, quick profile: tables, and reports/quick/index.html
	$(BIN) -m theory_checks run --profile quick --out reports/quick

verify-paper: $(CHECKS_INSTALLED) ## The same on the full grid of the paper (hours): reports/paper
	$(BIN) -m theory_checks run --profile paper --jobs $(JOBS) --out reports/paper

test: $(DEV_INSTALLED) ## Run the tests, without the slow ones and those that need a GPU
	$(PYTEST) $(PARALLEL)

test-slow: $(DEV_INSTALLED) ## Run the slow tests
	$(PYTEST) $(PARALLEL) -m "slow and not gpu"

test-gpu: $(DEV_INSTALLED) ## Run the tests that need a CUDA device
	$(PYTEST) -m gpu

test-packaging: $(DEV_INSTALLED) ## Build the wheel and look at what is in it
	$(PYTEST) -m "not gpu" tests/test_packaging.py

lint: $(DEV_INSTALLED) ## Look for mistakes and unformatted code (ruff)
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .

format: $(DEV_INSTALLED) ## Mend what ruff can mend, and format
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

typecheck: $(DEV_INSTALLED) ## Check the types of the three packages (mypy)
	$(BIN) -m mypy

notebooks: $(NOTEBOOKS_INSTALLED) ## Open the notebooks in JupyterLab
	$(BIN) -m jupyter lab --notebook-dir=notebooks $$([ "$$(id -u)" != 0 ] || echo --allow-root)

test-notebooks: $(NOTEBOOKS_INSTALLED) ## Run every notebook from clean; the first error ends it
	$(PYTEST) --nbmake --nbmake-timeout=$(CELL_LIMIT) --exitfirst --durations=0 notebooks

write-notebooks: $(NOTEBOOKS_INSTALLED) ## The same, and put the outputs into the files
	OMP_NUM_THREADS=1 $(BIN) -m jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.timeout=$(CELL_LIMIT) $(WITHOUT_CHANCE) notebooks/*.ipynb

bench: $(BENCH_INSTALLED) ## Run the benchmarks
	@set -e; for script in benchmarks/[!_]*.py; do \
		if [ ! -e "$$script" ]; then echo "there are no benchmarks yet"; break; fi; \
		echo "running $$script"; \
		$(BIN) "$$script"; \
	done

clean: ## Remove caches and build products
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environment and the reports as well
	rm -rf $(VENV) reports

# An interpreter that is found may still be too old, be a stub that starts nothing, or lack
# ensurepip (some systems package it apart), so each candidate is run. 3.11 first: it is the tested one.
$(VENV_MADE):
	@usable='import sys, ensurepip; raise SystemExit(sys.version_info < (3, 11))'; \
	candidates="$(PYTHON)"; \
	for python in $${candidates:-python3.11 python3.12 python3.13 python3 python}; do \
		if "$$python" -c "$$usable" >/dev/null 2>&1; then \
			echo "making $(VENV) with $$("$$python" --version)"; \
			"$$python" -m venv "$(VENV)" && touch $@; \
			exit; \
		fi; \
	done; \
	echo "ode-stopping needs Python 3.11 or newer, with the venv and ensurepip modules." >&2; \
	echo "Looked for: $${candidates:-python3.11 python3.12 python3.13 python3 python}." >&2; \
	echo "Name one with: make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1

$(CHECKS_INSTALLED): $(VENV_MADE) pyproject.toml constraints.txt
	$(INSTALL) -e ".[checks]"
	@touch $@

$(NOTEBOOKS_INSTALLED): $(VENV_MADE) pyproject.toml constraints.txt
	$(INSTALL) -e ".[notebooks]"
	@touch $(CHECKS_INSTALLED) $@

$(DEV_INSTALLED): $(VENV_MADE) pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev]"
	@touch $(CHECKS_INSTALLED) $@

$(BENCH_INSTALLED): $(VENV_MADE) pyproject.toml constraints.txt
	$(INSTALL) -e ".[bench]"
	@touch $(CHECKS_INSTALLED) $@
