# make demo and make test do all there is to do on a fresh machine; make help lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= runs/digits

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --root-user-action ignore

NATIVE := $(shell find csrc -type f) setup.py CMakeLists.txt pyproject.toml

.PHONY: help setup test test-fast test-all demo bench lint types clean
.DEFAULT_GOAL := help

help:
	@echo "make setup            $(VENV) with $(TORCH) and emd_fast, editable, with everything for development"
	@echo "make test             set up, then the tests; test-fast for every edit, test-all for everything"
	@echo "make demo [SHORT=1]   set up, then distil the digits into runs/digits"
	@echo "make bench            time the ops beside PyTorch (ARGS='langevin_eps --threads 2'): docs/benchmarks.md"
	@echo "make lint, make types ruff; mypy"
	@echo "make clean            removes $(VENV), the build and the compiled module; runs/ stays"
	@echo "PYTHON=python3.12 and TORCH='torch==2.11.0' choose others; a different TORCH wants make clean first"

# torch alone first: the build compiles against it, and a plain requirement would fetch the newest.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) '$(TORCH)'
	touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(PIP) 'setuptools>=77' wheel cmake ninja
	touch $@

# The installed torch is given as a constraint, so that no dependency replaces it.
$(STAMP): $(VENV)/.tools $(NATIVE)
	$(BIN)/pip freeze | grep '^torch==' > $(VENV)/constraints.txt
	$(PIP) --no-build-isolation -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

setup: $(STAMP)

# One worker a core. Tests in one file often share a fixture, so a worker starts with neighbours; one that has nothing left
# takes over from another. pytest fails where it collects no test.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# $(1): options that select the tier. The Triton kernels are interpreted in a run of their own, since Triton reads the
# variable where a kernel is defined; there is no Triton but on Linux.
define run_tests
$(PYTEST) $(1) $(ARGS)
$(if $(filter Linux,$(shell uname -s)),TRITON_INTERPRET=1 $(PYTEST) $(1) $(ARGS))
endef

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow and not exhaustive' $(ARGS)

test: $(STAMP)
	$(call run_tests,-m 'not exhaustive')

test-all: $(STAMP)
	$(call run_tests,)

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
