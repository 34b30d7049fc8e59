# Everything a fresh machine needs is made here: `make demo` and `make test` set themselves up.
# Needs Python 3.11 or 3.12 and make. ACCEL=cuda takes fbgemm's CUDA build instead of the CPU one.
PY    ?= python3.11
ACCEL ?= cpu
VENV  ?= .venv

BIN = $(VENV)/bin
FBGEMM_cpu  = fbgemm-gpu-cpu==1.8.0
FBGEMM_cuda = fbgemm-gpu==1.8.0
READY = $(VENV)/ready-$(ACCEL)

.PHONY: setup demo test slow check lock bench clean help

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## an environment in .venv, once

# Two steps, because torchrec asks pip for fbgemm's CUDA wheel under a name that shares its folder with the CPU one.
$(READY): requirements.lock pyproject.toml
	@test -n "$(FBGEMM_$(ACCEL))" || { echo "ACCEL=$(ACCEL) is not known: use ACCEL=cpu or ACCEL=cuda"; exit 1; }
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	rm -f $(VENV)/ready-*
	$(BIN)/python -m pip uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu
	$(BIN)/python -m pip install -q torch==2.13.0 -c requirements.lock
	$(BIN)/python -m pip install -q --no-deps -r requirements.lock "$(FBGEMM_$(ACCEL))"
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
