# make demo        the whole system on this machine, from nothing (a few minutes)
# make study       which part of StableOPD does what: 11 arms on 5 seeds, one report (runs/study); ARGS="--seeds 1" for one
# make test        unit, contract, Ray, page and (with a CUDA device) GPU tests, two files at a time
# make test-fast   those without Ray, vLLM and DeepSpeed, under a minute, for the hand
# make setup       only install, into .venv, for this machine's GPU or CPU; DEVICE=cpu or gpu, PYTHON=... for another
# make lint        ruff; make clean removes caches and .venv, but no runs
#
# ARGS goes to the command: make demo ARGS="seed=3 learner.steps=50", make test ARGS="-k staleness".

# Each device has its environment, and .venv is a link to the one that was last asked for: what was set up with
# DEVICE=gpu is what make test then runs in.
LAST := $(patsubst .venv-%,%,$(notdir $(shell readlink .venv)))
DEVICE ?= $(or $(if $(filter setup,$(MAKECMDGOALS)),,$(LAST)),$(shell .ci/device))
override DEVICE := $(DEVICE)
ARGS ?=
TESTS_AT_ONCE ?= 2
RUN := .venv/bin/python

# One thread per process: each actor is a process, and two threads in each are slower than one.
export OMP_NUM_THREADS ?= 1

# Tests start hundreds of processes: where an environment keeps nothing that is compiled, each compiles all it imports.
test test-fast: export PYTHONDONTWRITEBYTECODE =

# Named after what decides the installation, so that an unchanged checkout never installs twice.
STAMP := .venv-$(DEVICE)/.ready-$(firstword $(shell cat pyproject.toml .ci/setup .ci/*.txt | cksum))

.PHONY: help link setup demo study test test-fast lint clean

help:
	@sed -n 's/^# //p' Makefile | head -7

setup: $(STAMP)

link:
	@.ci/link $(DEVICE)

$(STAMP): | link
	@.ci/setup $(DEVICE) $(STAMP)

demo: $(STAMP)
	@$(RUN) jobs/demo.py $(ARGS)

study: $(STAMP)
	@$(RUN) jobs/ablation.py $(ARGS)

test: $(STAMP)
	@$(RUN) -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP)
	@$(RUN) -m pytest -n $(TESTS_AT_ONCE) -m "not slow" tests/unit $(ARGS)

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

clean:
	rm -rf .venv .venv-cpu .venv-gpu build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
