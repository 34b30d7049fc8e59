# Everything a fresh machine needs is made here: `make demo` and `make test` set themselves up.
# Needs Python 3.11 or 3.12 and make. ACCEL=cuda takes fbgemm's CUDA build instead of the CPU one.
PY    ?= python3.11
ACCEL ?= cpu
VENV  ?= .venv

BIN = $(VENV)/bin
FBGEMM_cpu  = fbgemm-gpu-cpu==1.8.0
FBGEMM_cuda = fbgemm-gpu==1.8.0
READY = $(VENV)/ready-$(ACCEL)
export PYTHONDONTWRITEBYTECODE =  # set, every worker would compile every test anew

.PHONY: help setup demo demo-retrieval production-demo test slow check lock peer clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY) ## an environment in .venv, once

# Two steps, because torchrec asks pip for fbgemm's CUDA wheel under a name that shares its folder with the CPU one.
$(READY): requirements.lock pyproject.toml
	@test -n "$(FBGEMM_$(ACCEL))" || { echo "ACCEL=$(ACCEL) is not known: use ACCEL=cpu or ACCEL=cuda"; exit 1; }
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	@if ls $(VENV)/ready-* 2>/dev/null | grep -qv ready-$(ACCEL); then \
		$(BIN)/python -m pip uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu; fi  # the two builds share one folder
	@rm -f $(VENV)/ready-*
	$(BIN)/python -m pip install -q torch==2.13.0 -c requirements.lock
	$(BIN)/python -m pip install -q --no-deps -r requirements.lock "$(FBGEMM_$(ACCEL))"
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## the main job on a synthetic log: raw days in, scores and a report out
	$(BIN)/recsys demo --output runs/demo

demo-retrieval: setup ## candidates for the long tail: two towers, an index, a second stage, recommendations, a report
	$(BIN)/recsys demo-retrieval --output runs/demo-retrieval

production-demo: setup ## five days of production: a real MLflow and a real Airflow, gone afterwards
	$(BIN)/recsys production-demo --output runs/production

test: check ## style, types, import contracts, then all tests but the slow ones
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"

slow: setup ## the other tests: whole grids, more examples, kills at every write, a scheduler, servers
	tests/postgres.sh
	THOROUGH=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "slow or hypothesis"

check: setup ## ruff, pyright, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/pyright
	$(BIN)/lint-imports

peer: .venv-peer/ready ## an environment for FuxiCTR and implicit, which bench/ compares with

.venv-peer/ready: bench/requirements-peer.txt requirements.lock
	$(PY) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q torch==2.13.0 -c requirements.lock
	.venv-peer/bin/python -m pip install -q --no-deps -r bench/requirements-peer.txt
	@touch $@

lock: ## resolve requirements.lock anew (needs uv; torch and fbgemm are installed apart)
	uv pip compile pyproject.toml --extra cpu --extra postgres --extra dev --python-version 3.11 --no-emit-package torch \
		--no-emit-package fbgemm-gpu-cpu --no-annotate --no-header -o requirements.lock

clean: ## remove what demo and benches made; keeps the environment
	rm -rf runs build
