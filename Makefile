# Every target makes .venv from requirements/ when there is none, or when the pins have changed.
# PY=python3.12       the interpreter of a new .venv
# TORCH_ARGS="..."    further pip arguments for torch, e.g. --index-url of the CPU builds
PY ?= python3
VENV ?= .venv
TORCH_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
KEY := $(shell cat $(filter-out requirements/bench.txt requirements/dali.txt,$(sort $(wildcard requirements/*.txt))) setup.py pyproject.toml | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(KEY)
PEERS := $(VENV)/.peers-$(KEY)-$(shell cksum < requirements/bench.txt | cut -d ' ' -f 1)
RESULT := build/bench/raw.json
TYPED := build/typed
OLD_TRITON := $(CURDIR)/build/triton-oldest
OLD_READY := $(OLD_TRITON)/.ready-$(shell cksum < requirements/oldest/triton.txt | cut -d ' ' -f 1)
DALI := $(CURDIR)/build/dali
DALI_READY := $(DALI)/.ready-$(shell cksum < requirements/dali.txt | cut -d ' ' -f 1)
CODE := ikd_fast kernels configs docs/examples tests benchmarks setup.py
WORDS := $(CODE) docs .ci requirements Makefile pyproject.toml $(wildcard *.md *.cff)

.DEFAULT_GOAL := help
.PHONY: help venv test configs distributed kernels dali lint bench bench-save demo quick-demo clean

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
	@$(PIP) --quiet -r requirements/dev.txt -r requirements/triton.txt
	@$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-* && touch $@

test: $(READY)  ## the test suite, but for the two below
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=15 -n 2 --dist loadfile -m "not configs and not distributed"

configs: $(READY)  ## every paper-scale config builds and makes a step at reduced size
	$(BIN)/pytest -q --durations=10 tests/configs

distributed: $(READY)  ## two processes, resuming, loader workers
	$(BIN)/pytest -q --durations=10 tests/distributed

$(OLD_READY): | $(READY)
	@echo "$(OLD_TRITON): the oldest supported triton"
	@rm -rf $(OLD_TRITON)
	@$(PIP) --quiet --no-deps --target $(OLD_TRITON) -r requirements/oldest/triton.txt
	@touch $@

# `make test` runs the kernel tests under the newest Triton.
kernels: $(READY) $(OLD_READY)  ## kernel tests under the oldest Triton; every kernel compiled by oldest and newest
	PYTHONPATH=$(OLD_TRITON) $(BIN)/pytest -q --durations=5 -W "ignore:Conversion of an array:DeprecationWarning" tests/kernels/triton_ops
	PYTHONPATH=$(OLD_TRITON) env -u TRITON_INTERPRET $(BIN)/python -m ikd_fast.kernels.aot
	env -u TRITON_INTERPRET $(BIN)/python -m ikd_fast.kernels.aot

# In one call: a second one into the same folder would leave the first one's `nvidia` and drop its own.
$(DALI_READY): | $(READY)
	@echo "$(DALI): NVIDIA DALI (500 MB to download)"
	@rm -rf $(DALI)
	@$(PIP) --quiet --no-deps --target $(DALI) -r requirements/dali.txt
	@touch $@

# First whether it loads: without it every one of these tests would be skipped.
dali: $(READY) $(DALI_READY)  ## what goes through NVIDIA DALI, on its CPU operators; `make test` skips it
	@PYTHONPATH=$(DALI) $(BIN)/python -c "from ikd_fast.dali import require_dali; print('DALI', require_dali().__version__)"
	PYTHONPATH=$(DALI) OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=5 tests/dali tests/demo/test_loader.py tests/docs/test_dali.py tests/benchmarks/test_loaders.py

# mypy cannot follow setup.py's folder mapping, so it reads the package through links laid out as installed.
lint: $(READY)  ## ruff, mypy, codespell
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/ikd_fast
	@ln -s $(CURDIR)/ikd_fast/* $(CURDIR)/kernels $(TYPED)/ikd_fast/
	cd $(TYPED) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p ikd_fast
	$(BIN)/codespell $(WORDS)

# --no-deps: what is compared with never moves what is compared.
$(PEERS): $(READY)
	@echo "$(VENV): the libraries that the benchmarks compare with"
	@$(PIP) --quiet --no-deps -r requirements/bench.txt
	@rm -f $(VENV)/.peers-* && touch $@

bench: $(READY) $(PEERS)  ## benchmarks on this machine, beside other libraries
	@mkdir -p $(dir $(RESULT))
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-json=$(RESULT)
	$(BIN)/python -m benchmarks.report $(RESULT) --out $(dir $(RESULT))

bench-save: $(RESULT)  ## keep the last `make bench` under benchmarks/results/
	$(BIN)/python -m benchmarks.report $(RESULT) --save

demo: $(READY)  ## three students distilled on real photographs (minutes)
	$(BIN)/ikd-fast demo

quick-demo: $(READY)  ## the same on a few steps
	$(BIN)/ikd-fast demo --quick

clean:  ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
