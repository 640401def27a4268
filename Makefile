# make run | test | test-slow | parity | contract | check | bench | sanitize: each does all its own set-up in a fresh clone.
#
#   make run RECIPE=recipes/other.toml OUT=runs/other ARGS='--set train.budget.count=10'
#   make test ARGS='tests/parts -k causal'
#   make PYTHON=python3.12 test

SHELL  := /bin/bash
PYTHON ?= python3
RECIPE ?= $(if $(shell command -v apt-get),recipes/libreoffice-en-de.toml,recipes/gettext-en-de.toml)
OUT    ?= runs/default
ARGS   ?=

VENV := .venv
BIN  := $(VENV)/bin
RUN  := $(VENV)/.installed-run
DEV  := $(VENV)/.installed-dev

NATIVE := setup.py $(wildcard polyformer/native/src/*)

OLD_PYTHON := polyformer needs Python 3.11 or newer, and $(PYTHON) is not: name another one, as in "make PYTHON=python3.12"

.PHONY: help run test test-slow parity contract check bench sanitize clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

run: $(RUN)
	$(BIN)/polyformer train $(RECIPE) --out $(OUT) $(ARGS)

# A process to each core, each of one thread: threads that share a core wait for each other.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow $(ARGS)

parity: $(DEV)
	$(BIN)/python -m tests.families.table $(ARGS)

contract: $(DEV)
	$(BIN)/python -m tests.parts.table $(ARGS)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

bench: $(DEV)
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

# The native side under the address and undefined-behaviour sanitizers, with programs, weights and tokens at random.
sanitize: $(DEV)
	$(BIN)/python -m tests.native.test_sanitize $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis polyformer.egg-info build polyformer/native/_native*

# Installed again whenever what is to be installed has changed. `make run` leaves out what only developers need.
$(RUN): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(call install,plot)
	@touch $@

$(DEV): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(call install,dev)
	@touch $(RUN) $@

define install
	@echo "Installing polyformer and what it needs into $(VENV) (once, a minute or two) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo '$(OLD_PYTHON)' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
