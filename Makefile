# A fresh machine needs make and Python 3.10 or newer, nothing else. `make help` lists the targets.
SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
QUICKSTART_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
TORTURE_ARGS ?=
MIN_COVERAGE := 85
# What the others share, and those that are given a file, a run or a folder.
NO_BENCH := $(addprefix benchmarks/,measuring.py beside_peers.py bench_clean.py bench_distill.py bench_needle.py export_exam.py \
  extend_context.py grpo_evidence.py harness_parity.py learn_minutes.py learn_nanochat.py quantize_table.py real_questions.py \
  scaling_fit.py sparse_learning.py)


.DEFAULT_GOAL := help
.PHONY: help install quickstart tour test test-all torture lint bench clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, PIP_ARGS=... goes to pip install,"
	@echo "  QUICKSTART_ARGS=... to osler quickstart, TEST_ARGS=... to pytest, TORTURE_ARGS=... to the torture;"
	@echo "  TEST_WORKERS=N tests in N processes of one thread each."

install: $(VENV)/.installed ## Install Osler into .venv

quickstart: $(VENV)/.installed ## Train, examine and report a small model on this machine, in minutes
	$(BIN)/python -m osler.cli quickstart $(QUICKSTART_ARGS)

tour: ## Print the ten places in the code that a stranger looks for first
	@$(PYTHON) scripts/tour.py

PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

test: $(VENV)/.installed-test ## Run the test suite without the slow tests
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: $(VENV)/.installed-test ## Run the whole test suite and check its coverage
	$(PYTEST) --cov=osler --cov-report=term --cov-fail-under=$(MIN_COVERAGE) $(TEST_ARGS)

torture: $(VENV)/.installed ## Interrupt and resume 200 small runs at random moments and compare every bit, in minutes
	$(BIN)/python benchmarks/torture_resume.py $(TORTURE_ARGS)

lint: $(VENV)/.installed-test ## Check style (ruff) and types (mypy)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(VENV)/.installed-test ## Run every benchmark that needs no file; each prints one JSON object
	@for script in $(filter-out $(NO_BENCH),$(wildcard benchmarks/*.py)); do echo "== $$script" >&2; $(BIN)/python "$$script" || exit 1; done

clean: ## Remove the environment and every cache; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage osler.egg-info build dist

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || \
	  { echo "Osler needs Python 3.10 or newer, and there is no '$(PYTHON)' here. Install one, or name yours: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Osler needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are older than these two files only when a requirement has changed, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@touch $(VENV)/.installed $@
