"""Several optimizer steps on one generation batch: TRL's `steps_per_generation`."""

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.files import read_metrics
from grpo_fast.model.packing import Sample
from grpo_fast.train.batch import build_step_batch
from support.runs import assert_same_run, trainer
from support.small import SMALL

# 32 completions of a generation batch for 4 steps of 8.
FOUR_STEPS = {
    "generation_batch_size": -1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 8,
}


def test_split_divides_the_completions_and_normalises_each_part():
    config = GRPOConfig(**{**SMALL, "loss_type": "dapo", "num_generations": 4, "generation_batch_size": 8})
    objective = config.objective()
    samples = [Sample([1], list(range(2, 3 + index)), index // 4) for index in range(8)]
    counted = torch.tensor([True] * 7 + [False])
    batch = build_step_batch(samples, counted, objective, config)
    count = len(batch.weights)
    batch.old_logprobs, batch.ref_logprobs = torch.arange(count) * -1.0, torch.arange(count) * -2.0
    batch.set_advantages(torch.arange(count) + 1.0, objective)
    parts = batch.split(2, objective, config)
    assert [len(part.samples) for part in parts] == [4, 4]
    seen = torch.cat([part.advantages for part in parts]) - 1
    assert sorted(seen.tolist()) == list(range(count))
    for part in parts:
        assert part.weights.sum().item() == pytest.approx(1)
        # Every token keeps its own values.
        assert torch.equal(part.old_logprobs, 1 - part.advantages)
        assert torch.equal(part.ref_logprobs, 2 - 2 * part.advantages)
        assert [len(sample.completion_ids) for sample in part.samples] == part.offsets.diff().tolist()
        # The completion that does not count is trained in neither.
        assert all(len(part.samples[index].completion_ids) < 8 for index in part.active)


def test_steps_of_one_generation_batch_share_its_completions(tmp_path):
    made = trainer(tmp_path, max_steps=8, **FOUR_STEPS)
    assert (made.config.generation_batch_size, made.config.updates_per_batch) == (32, 4)
    made.train()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    rewards = [entry["reward"] for entry in metrics]
    assert len(set(rewards[:4])) == len(set(rewards[4:])) == 1
    assert rewards[3] != rewards[4]
    # Each step moves the weights by its own part of the completions.
    assert len({entry["loss"] for entry in metrics}) == 8
    assert len({entry["num_tokens"] for entry in metrics}) == 2


def test_run_of_several_steps_per_generation_resumes_like_one_that_never_stopped(tmp_path):
    fields = {**FOUR_STEPS, "num_iterations": 2, "save_steps": 3, "save_total_limit": 10, "beta": 0.1}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    trainer(whole, max_steps=18, **fields).train()
    # Checkpoints fall between generation batches, of which each serves 8 steps.
    assert {path.name for path in whole.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16", "checkpoint-18"}
    trainer(resumed, max_steps=18, **fields).train()
    for step in (16, 18):
        (resumed / f"checkpoint-{step}").rename(tmp_path / f"removed-{step}")
    trainer(resumed, resume=True, max_steps=18, **fields).train()
    assert_same_run(resumed, whole)


def test_epochs_become_steps_and_the_first_step_is_logged(tmp_path):
    fields = {"num_train_epochs": 0.5, "max_steps": -1, "logging_steps": 1000, "logging_first_step": True}
    made = trainer(tmp_path, warmup_ratio=0.5, **fields)
    steps = made.config.max_steps
    assert steps == -(-(len(made.train_rows) // 8) // 2) > 2
    made.train()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in metrics] == [1, steps]
    assert metrics[0]["learning_rate"] == 0
    schedule = made.learner.scheduler.lr_lambdas[0]
    warm = -(-steps // 2)
    assert schedule(warm) == 1 > schedule(warm - 1)
    # The written configuration says how many steps they were.
    assert f"max_steps: {steps}\n" in (tmp_path / "config.yaml").read_text()
