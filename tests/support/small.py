"""A training run small enough for tests."""

from __future__ import annotations

import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.files import read_metrics
from grpo_fast.trainer import GRPOTrainer

SMALL = {
    "model_name_or_path": "random-llama",
    "model_init_kwargs": {"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.1},
    "dataset_name": "sort_digits",
    "dataset_kwargs": {"length": 2, "test_size": 20},
    "reward_funcs": ["digits_included", "digits_ordered", "exact_answer"],
    "num_generations": 4,
    "generation_batch_size": 32,
    "max_completion_length": 3,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "use_cpu": True,
}


def trainer(folder, **fields) -> GRPOTrainer:
    return GRPOTrainer(GRPOConfig(**{**SMALL, "output_dir": str(folder), **fields}))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(folder, **fields):
    made = trainer(folder, **fields)
    before = weights(made.model)
    made.train()
    return read_metrics(folder / "metrics.jsonl"), before, weights(made.model)
