# make demo | test | lint | bench | clean. Each is enough alone: it makes .venv and installs what it
# needs. Options go on with ARGS, for instance: make demo ARGS="--seconds 20 --out out/demo"

PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.6.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# What an extra of pyproject.toml names, installed without building again.
extra = $(BIN)/python -c 'from importlib.metadata import requires; \
  print(*[r.split(";")[0] for r in requires("tml-kernels") if "extra == \"$(1)\"" in r], sep="\n")' \
  >$(VENV)/$(1).txt && $(PIP) install -r $(VENV)/$(1).txt
NATIVE := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint bench info clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,2s/^# //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/tml-runtime demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.test
	$(BIN)/python -m bench $(ARGS)

info: $(VENV)/.base
	$(BIN)/tml-runtime info

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks out
	find . -name '*.so' -o -name __pycache__ | xargs rm -rf

# The CPU build of torch where no NVIDIA GPU is found: from pip's own index when it has one, else by
# uv, which knows where it is kept; else the ordinary build, which runs on a CPU too but is large.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "tml-kernels needs Python >= 3.10; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "no C++ compiler ($${CXX:-c++}): the KV cache and the tick loop cannot be built, so neither demo nor test. Install g++ or clang++, or set CXX. Without one, 'pip install .' still gives the ops."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make $(VENV): install the venv module of $(PYTHON) (Debian: python3-venv)"; rm -rf $(VENV); exit 1; }
	@echo "installing torch $(TORCH) (a minute or two) ..."
	@if nvidia-smi -L >/dev/null 2>&1; then $(PIP) install 'torch==$(TORCH)'; \
	else \
	  $(PIP) install 'torch==$(TORCH)+cpu' 'triton==$(TRITON)' 2>/dev/null \
	  || { $(PIP) install uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu 'torch==$(TORCH)' 'triton==$(TRITON)'; } \
	  || $(PIP) install 'torch==$(TORCH)'; \
	fi
	@touch $@

# The build's own lines (no nvcc, a broken one) are shown; all of its output only when it fails.
$(VENV)/.base: $(VENV)/.torch $(NATIVE)
	@echo "building tml-kernels ..."
	@$(BIN)/python -m pip install -v -e . >$(VENV)/build.log 2>&1 || \
	  { tail -n 40 $(VENV)/build.log; echo "the build failed; all of it is in $(VENV)/build.log"; exit 1; }
	@grep -oE '^ *tml-kernels: .*' $(VENV)/build.log || true
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	@$(call extra,demo)
	@$(BIN)/python -m tml_runtime.demo.media
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(call extra,serve)
	@$(call extra,handoff)
	@$(call extra,bench)
	@$(call extra,test)
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(call extra,dev)
	@touch $@
