# Every target makes .venv from requirements/ when there is none, or when the pins have changed.
# PY=python3.12       the interpreter of a new .venv
# TORCH_ARGS="..."    further pip arguments for torch, e.g. --index-url of the CPU builds
PY ?= python3
VENV ?= .venv
TORCH_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
KEY := $(shell cat requirements/*.txt setup.py pyproject.toml | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(KEY)
TYPED := build/typed
CODE := ikd_fast kernels configs tests benchmarks setup.py
WORDS := $(CODE) docs .ci requirements Makefile pyproject.toml $(wildcard *.md *.cff)

.DEFAULT_GOAL := help
.PHONY: help venv test lint bench demo quick-demo clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv: $(READY)  ## .venv from the pinned requirements, the package installed in place

$(READY):
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ikd_fast needs Python 3.10 or newer; $(PY) is $$($(PY) -V 2>&1). Write: make PY=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PY) -m venv $(VENV)
	@echo "$(VENV): torch (by far the largest download)"
	@$(PIP) --quiet $(TORCH_ARGS) -c requirements/dev.txt -r requirements/torch.txt
	@echo "$(VENV): the other pinned requirements"
	@$(PIP) --quiet -r requirements/dev.txt
	@$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-* && touch $@

test: $(READY)  ## the whole test suite
	$(BIN)/pytest -q --durations=15

# mypy cannot follow setup.py's folder mapping, so it reads the package through links laid out as installed.
lint: $(READY)  ## ruff, mypy, codespell
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/ikd_fast
	@ln -s $(CURDIR)/ikd_fast/* $(CURDIR)/kernels $(TYPED)/ikd_fast/
	cd $(TYPED) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p ikd_fast
	$(BIN)/codespell $(WORDS)

bench: $(READY)  ## benchmarks on this machine
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name

demo: $(READY)  ## three students distilled on real photographs (minutes)
	$(BIN)/ikd-fast demo

quick-demo: $(READY)  ## the same on a few steps
	$(BIN)/ikd-fast demo --quick

clean:  ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
