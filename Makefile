# On a fresh clone: `make demo` or `make test`. Both make .venv and install into it first, and reuse it afterwards.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The version that .python-version names; `make setup PYTHON=/path/to/python3.12` takes another interpreter.
PYTHON ?= python$(shell cat .python-version)
VENV := .venv
INSTALLED := $(VENV)/.installed
# Versions and hashes of everything that is installed; `make lock` renews them.
LOCKS := requirements/build.lock requirements/dev.lock requirements/newest.lock requirements/gpu_sources.lock
# What builds the docs site, in addition to what is installed.
DOCS := $(VENV)/docs
# Next to the installed transformers, for the tests that run under both: first on PYTHONPATH.
NEWEST := $(VENV)/newest
UNDER_NEWEST = PYTHONPATH=$(CURDIR)/$(NEWEST) HYBRIDPRUNE_TRANSFORMERS=$$(sed -n 's/^transformers==\([^ ]*\).*/\1/p' requirements/newest.lock)
# Source packages, unpacked: see requirements/gpu_sources.lock.
GPU_SOURCES := $(VENV)/gpu_sources
# Likewise, what the index has today, whatever the locks say: for `make test-newest`.
NEWEST_ALL := $(VENV)/newest-all
# A locked version is taken as it is: no resolver, and no build environment that would fetch what is not locked.
PIP_LOCKED := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation
# Installs what is not locked, with the locks as constraints: no locked version changes.
UV_PIP = $(VENV)/bin/uv pip install --python $(VENV)/bin/python --constraint $(VENV)/locked.txt
# Native operators: built again if a source changes. HYBRIDPRUNE_CUDA=0 leaves the CUDA ones out.
KERNELS := $(wildcard kernels/setup.py kernels/pyproject.toml kernels/csrc/*.* kernels/csrc/*/*.* kernels/src/*/*.py)
# Tests that need no GPU and no patience; `make test-all` runs the slow ones too.
QUICK := not gpu and not slow
# Sets $$skipped to what leaves the tests on a Slurm cluster out, where there is none and none can be installed: it says why.
WITH_SLURM := skipped=""; scripts/dev_cluster.sh install || { \
  skipped="and not slurm"; echo "Without Slurm, the tests marked slurm do not run."; }
# Two tests at a time, a core each, as tests/scheduler.py deals them out.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2
# Passed on, e.g. make demo ARGS="--fresh reduction.budget=0.35" or make test ARGS="tests/method -x".
ARGS ?=

.PHONY: help setup setup-gpu lock demo test test-all test-newest lint bench docs clean

help:
	@sed -n 's/^# make/make/p' Makefile

# make setup     builds .venv and installs what the locks name (again only if they changed)
setup: $(INSTALLED)

# Pip's lines, without those that say nothing new and cut to a terminal's width.
$(INSTALLED): pyproject.toml .python-version $(LOCKS) $(KERNELS)
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "$(PYTHON) not found: install Python $$(cat .python-version), or name it: make setup PYTHON=/path/to/python"; exit 1; }
	@test -x $(VENV)/bin/python || { echo "making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing into $(VENV) (about 5 GB, some minutes the first time)"
	@$(PIP_LOCKED) --quiet --require-hashes -r requirements/build.lock
	@$(PIP_LOCKED) --require-hashes -r requirements/dev.lock \
	  | sed -u -e '/already satisfied/d' -e '/^  \(Using cached\|Getting\|Installing\|Preparing\)/d' \
	      -e '/\.metadata/d' -e '/eta 0:/d' -e 's/^\(.\{117\}\).*/\1.../'
	@$(PIP_LOCKED) --quiet -e .
	@rm -rf $(NEWEST)
	@$(PIP_LOCKED) --quiet --require-hashes --target $(NEWEST) -r requirements/newest.lock
	@rm -rf $(GPU_SOURCES) && mkdir -p $(GPU_SOURCES)
	@MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE $(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --require-hashes \
	    --no-binary mamba-ssm,causal-conv1d --dest $(GPU_SOURCES) -r requirements/gpu_sources.lock \
	    > $(VENV)/gpu_sources.log 2>&1 && \
	  for each in $(GPU_SOURCES)/*.tar.gz; do tar -xzf $$each -C $(GPU_SOURCES); done && \
	  for each in $(GPU_SOURCES)/*.whl; do $(VENV)/bin/python -m zipfile -e $$each $${each%-py3-*}; done || \
	  echo "sources of the GPU packages cannot be fetched ($(VENV)/gpu_sources.log): the tests that read or run them are skipped"
	@echo "building the native operators of kernels/ (a minute or two)"
	@$(PIP_LOCKED) --verbose ./kernels > $(VENV)/kernels.log 2>&1 || { cat $(VENV)/kernels.log; exit 1; }
	@sed -n 's/^ *hybridprune-kernels: //p' $(VENV)/kernels.log | sort -u
	@touch $@

# make setup-gpu on a machine with a GPU, adds the kernels of Transformer Engine and Mamba, compiled for the torch that is there
setup-gpu: $(INSTALLED)
	@command -v nvcc > /dev/null || test -n "$${CUDA_HOME:-}" || { \
	  echo "nvcc not found: the gpu extra is compiled. Load CUDA $$($(VENV)/bin/python -c 'import torch; print(torch.version.cuda)'), or set CUDA_HOME"; exit 1; }
	@echo "compiling the gpu extra (tens of minutes the first time, then from uv's cache; MAX_JOBS=4 takes less memory)"
	@sed -n 's/^\([A-Za-z0-9_.-]*==[^ ;]*\).*/\1/p' requirements/dev.lock > $(VENV)/locked.txt
	@$(UV_PIP) ninja wheel packaging pybind11
	@$(UV_PIP) --no-build-isolation -e ".[gpu]"

# make lock      renews the locks: the newest versions that pyproject.toml allows, and the newest transformers
COMPILE := $(VENV)/bin/uv pip compile --upgrade --generate-hashes --no-annotate --custom-compile-command "make lock" --quiet \
  --python-version 3.12 --python-platform x86_64-manylinux_2_28
lock: $(INSTALLED)
	@$(COMPILE) pyproject.toml --extra dev --group lmms-eval --output-file requirements/dev.lock
	@printf 'pip\nsetuptools\n' | $(COMPILE) - --constraint requirements/dev.lock --output-file requirements/build.lock
	@echo mkdocs-material | $(COMPILE) - --constraint requirements/dev.lock --output-file requirements/docs.lock
	@echo transformers | $(COMPILE) - --no-deps --output-file requirements/newest.lock
	@git diff --stat -- requirements

# make demo      the main job on the embedded default; ends with a table and runs/demo/
demo: $(INSTALLED)
	@$(VENV)/bin/python recipes/demo.py $(ARGS)

# make test      lint and the tests that run here, on a Slurm of two nodes too where that is available
test: lint
	@$(WITH_SLURM); $(PYTEST) -m "$(QUICK) $$skipped" $(ARGS)
	@test -n "$(ARGS)" || $(UNDER_NEWEST) $(PYTEST) -m "$(QUICK)" tests/export

# make test-all  the slow tests too
test-all: lint
	@$(WITH_SLURM); $(PYTEST) -m "not gpu $$skipped" $(ARGS)

# make test-newest  the tests under the newest megatron-core and transformers of the index (ARGS as above)
test-newest: $(INSTALLED)
	@rm -rf $(NEWEST_ALL)
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade --no-deps --target $(NEWEST_ALL) \
	  megatron-core transformers
	@$(VENV)/bin/python -m pip list --disable-pip-version-check --path $(NEWEST_ALL)
	@PYTHONPATH=$(CURDIR)/$(NEWEST_ALL) $(PYTEST) -p no:cacheprovider -m "$(QUICK) and not slurm" $(ARGS)

# make bench     speed here: prefill, training step, transformers, every native operator; on a GPU those of the 12B model too
BENCH_12B := experiment=nemotron_nano_12b_v2_vl parallel=single trainer.num_nodes=1 trainer.devices=1 \
  trainer.recompute=none model.hybrid_pattern=M-M-M-M*-M-M-M-M*- reduction.budget=0.25
bench: $(INSTALLED)
	@$(VENV)/bin/python recipes/benchmark.py $(ARGS)
	@$(VENV)/bin/python kernels/bench.py
	@if $(VENV)/bin/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then \
	  $(VENV)/bin/python kernels/bench.py --device cuda --out runs/bench/kernels_cuda.json; \
	  $(VENV)/bin/python recipes/benchmark.py $(BENCH_12B) --visual-tokens 32768 131072 --no-peer --no-train \
	    --out runs/bench/12b; \
	  for fp8 in none tensorwise; do \
	    $(VENV)/bin/python recipes/benchmark.py $(BENCH_12B) fp8=$$fp8 --visual-tokens 16384 --no-peer --no-decode \
	      --out runs/bench/12b_fp8_$$fp8; done; fi

# make lint      ruff and mypy
lint: $(INSTALLED)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# make docs      the docs site, in build/site
docs: $(DOCS)/.installed
	@NO_MKDOCS_2_WARNING=true PYTHONPATH=$(DOCS) $(VENV)/bin/python -m mkdocs build --clean 2>&1 | sed "/^INFO/d; /^$$/d"
	@echo "build/site/index.html"

$(DOCS)/.installed: requirements/docs.lock $(INSTALLED)
	@rm -rf $(DOCS)
	@$(PIP_LOCKED) --quiet --require-hashes --target $(DOCS) -r requirements/docs.lock
	@touch $@

# make clean     removes caches and what runs wrote; .venv stays
clean:
	rm -rf runs build kernels/build kernels/*.egg-info kernels/src/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
