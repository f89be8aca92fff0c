"""The score of a policy: the mean of one reward function on the evaluation prompts, sampled."""

from __future__ import annotations

from typing import Any

import torch

from grpo_fast.data import Row
from grpo_fast.rewards import RewardModel, Rewards
from grpo_fast.rollout import Response, Rollout, Sampling


def sample_and_score(
    rollout: Rollout,
    rewards: RewardModel,
    tokenizer: Any,
    rows: list[Row],
    prompt_ids: list[list[int]],
    sampling: Sampling,
) -> tuple[list[Response], list[str], Rewards]:
    """Sample `num_generations` responses to each row and score them: (responses, their texts, rewards)."""
    responses = rollout.generate(prompt_ids, sampling)
    ids = [list(response.token_ids) for response in responses]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    repeated = [row for row in rows for _ in range(sampling.num_generations)]
    prompts = [row["prompt"] for row in repeated]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {name: [row.get(name) for row in repeated] for name in repeated[0] if name != "prompt"}
    return responses, texts, rewards(prompts, completions, {**columns, "completion_ids": ids})


def evaluate(
    rollout: Rollout,
    rewards: RewardModel,
    metric: int,
    tokenizer: Any,
    rows: list[Row],
    prompt_ids: list[list[int]],
    sampling: Sampling,
    seed: int,
) -> float:
    """Mean of reward function `metric`; the sampling has its own seed and leaves the training's generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, _, scored = sample_and_score(rollout, rewards, tokenizer, rows, prompt_ids, sampling)
    return scored.each[:, metric].nanmean().item()
