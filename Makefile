# make demo and make test do all there is to do on a fresh machine; make help lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= runs/digits

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

NATIVE := $(shell find csrc -type f) setup.py CMakeLists.txt pyproject.toml

.PHONY: help setup test demo bench lint types clean
.DEFAULT_GOAL := help

help:
	@echo "make setup            $(VENV) with $(TORCH) and emd_fast, editable, with everything for development"
	@echo "make test             set up, then the tests (ARGS='-m \"not slow\"' for the quick ones)"
	@echo "make demo [SHORT=1]   set up, then distil the digits into runs/digits"
	@echo "make bench            time the ops beside PyTorch (ARGS='langevin_eps --threads 2'): docs/benchmarks.md"
	@echo "make lint, make types ruff; mypy"
	@echo "make clean            removes $(VENV), the build and the compiled module; runs/ stays"
	@echo "PYTHON=python3.12 and TORCH='torch==2.11.0' choose others; a different TORCH wants make clean first"

# torch alone first: the build compiles against it, and a plain requirement would fetch the newest.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install '$(TORCH)'
	touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(BIN)/pip install --quiet 'setuptools>=77' wheel cmake ninja
	touch $@

# The installed torch is given as a constraint, so that no dependency replaces it.
$(STAMP): $(VENV)/.tools $(NATIVE)
	$(BIN)/pip freeze | grep '^torch==' > $(VENV)/constraints.txt
	$(BIN)/pip install --no-build-isolation -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

setup: $(STAMP)

# A worker for each core. Each starts with tests that stand together, since those share what they set up; one that has
# nothing left takes over from another.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

demo: $(STAMP)
	$(BIN)/emd-fast distill digits --out $(OUT) $(if $(filter 1,$(SHORT)),--short)

bench: $(STAMP)
	$(BIN)/emd-fast bench $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build emd_fast.egg-info emd_fast/_C*.so emd_fast/_build.json
