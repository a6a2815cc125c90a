# One environment, .venv, holds all extras at the versions of constraints.txt, and both distributions, editable.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := embedded,train,lora,ray,eval,app,heic,docs,dev
EMBEDDED := packages/nexus-adapters-embedded
INSTALLED := $(VENV)/.installed
IS_NEW := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help demo test check check-full check-results docs study format constraints clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST)

# Installed once, and again when what is to be installed has changed. An environment without pip, or of an older
# Python, is what a failed first attempt leaves behind.
$(INSTALLED): pyproject.toml $(EMBEDDED)/pyproject.toml constraints.txt
	@{ $(BIN)/python -c '$(IS_NEW)' && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || { \
		$(PYTHON) -c '$(IS_NEW)' \
		|| { echo "expected Python 3.11 or newer, received $$($(PYTHON) --version); set PYTHON" >&2; exit 1; }; \
		echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install -c constraints.txt -e $(EMBEDDED) -e ".[$(EXTRAS)]"
	@touch $@

demo: $(INSTALLED)  ## generate the demo sheet in demo/
	$(BIN)/nexus demo --force

# A process for each core, four at most: each takes about 2 GiB.
test: $(INSTALLED)  ## run the tests
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --no-loadscope-reorder

check: $(INSTALLED)  ## lint, format check, types, import order, documentation, then the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/build_site.py
	$(MAKE) test

check-full: $(INSTALLED)  ## the long tests, among them examples/tour.ipynb
	$(BIN)/pytest -m full

docs: $(INSTALLED)  ## update the reference, build the documentation site, and show it
	$(BIN)/python scripts/docs_reference.py
	$(BIN)/python scripts/build_site.py --serve

check-results: $(INSTALLED)  ## compare the tables in documents with the raw results
	$(BIN)/python scripts/check_results.py

study: $(INSTALLED)  ## a miniature study, in minutes: build/study
	$(BIN)/nexus study benchmarks/plans/miniature.toml --out build/study

format: $(INSTALLED)  ## format, and fix what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints:  ## resolve constraints.txt anew, torch excepted
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install "$$(grep '^torch==' constraints.txt)" -e $(EMBEDDED) -e ".[$(EXTRAS)]"
	grep '^#' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --exclude-editable --exclude setuptools \
		| sed 's/+[a-z0-9.]*$$//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## remove caches and build output, not .venv
	rm -rf build dist $(EMBEDDED)/dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
