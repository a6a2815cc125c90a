# One environment, .venv, holds all extras at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,eval,app,dev
INSTALLED := $(VENV)/.installed

.PHONY: help demo test check format constraints clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*##/\1:/p' $(MAKEFILE_LIST)

# Installed once, and again when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: $(INSTALLED)  ## draw the demo sheet into demo/
	$(BIN)/nexus demo --force

test: $(INSTALLED)  ## run the tests
	$(BIN)/pytest

check: $(INSTALLED)  ## lint, format check, types, import order, then the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: $(INSTALLED)  ## format, and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints:  ## resolve constraints.txt anew, torch excepted
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install "$$(grep '^torch==' constraints.txt)" -e ".[$(EXTRAS)]"
	grep '^#' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --exclude-editable --exclude setuptools \
		| sed 's/+[a-z0-9.]*$$//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## remove caches and build output, not .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
