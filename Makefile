# `make quickstart` and `make test` need nothing but Python: both make .venv first. PYTHON=… picks the interpreter,
# TORCH_INDEX=… another index for torch, such as PyTorch's for CPUs, whose wheels are much smaller (docs/install.md).
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
# Two processes with one torch thread each. Each starts with one half of the tests, in order, so that few
# fixtures are built twice.
TWO := -n 2 --dist worksteal

# Compiled files stay: the tests start many processes, each of which would compile the package again.
test test-fast test-floor: export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart test test-fast test-floor lint types docs dist clean

quickstart: $(VENV)/installed
	$(BIN)/mdistiller quickstart

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(TWO)

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(TWO) -m "not slow"

# The fast tests with the lowest version of every direct dependency.
test-floor: $(FLOOR)/installed-dev
	$(FLOOR)/bin/python -m pytest $(TWO) -m "not slow"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Of benchmarks only names and arguments of what they call.
LOOSE = --ignore-missing-imports $(foreach code,arg-type assignment dict-item operator type-var \
	union-attr unused-ignore var-annotated,--disable-error-code $(code))
types: $(VENV)/installed-dev
	$(BIN)/mypy
	$(BIN)/mypy $(LOOSE) benchmarks

# Always from scratch: a page that a changed page lists would not be read again.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going docs build/docs
	@echo "build/docs/index.html"

# Wheel and source archive in dist/.
dist: $(VENV)/bin/python
	$(BIN)/pip install 'build>=1.2.1'
	rm -rf dist
	$(BIN)/python -m build --outdir dist

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mdistiller needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install torch torchvision --index-url $(TORCH_INDEX))

# Marked by files, so that a change of pyproject.toml installs again.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --editable '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --editable '.[docs]'
	touch $@ $(VENV)/installed

$(FLOOR)/installed-dev: pyproject.toml .ci/floor.py
	rm -rf $(FLOOR)
	$(PYTHON) -m venv $(FLOOR)
	$(PYTHON) .ci/floor.py > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/pip install --editable '.[dev]' --constraint $(FLOOR)/constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(FLOOR) build docs/generated dist .mypy_cache .pytest_cache .ruff_cache
