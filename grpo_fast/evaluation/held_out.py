"""The metrics of a policy on held-out prompts."""

from __future__ import annotations

from typing import Any

from grpo_fast.data import Row
from grpo_fast.distributed.rng import own_generators
from grpo_fast.rewards import RewardModel
from grpo_fast.rollout import Rollout, Sampling
from grpo_fast.train.groups import sample_and_score
from grpo_fast.train.metrics import completion_metrics


def evaluate(
    rollout: Rollout,
    rewards: RewardModel,
    tokenizer: Any,
    rows: list[Row],
    prompt_ids: list[list[int]],
    sampling: Sampling,
    seed: int,
) -> dict[str, float]:
    """Means over sampled completions of `rows`: of every reward function, of the lengths, and the clipped ratio.

    Sampling uses its own random generators, seeded with `seed`. The names are those of training metrics with the prefix
    ``eval/``, as in ``eval/rewards/exact_answer/mean``.
    """
    with own_generators(seed):
        responses, _, scored = sample_and_score(rollout, rewards, tokenizer, rows, prompt_ids, sampling)
    figures = {f"rewards/{name}/mean": scored.each[:, i].nanmean().item() for i, name in enumerate(rewards.names)}
    lengths = completion_metrics(responses)
    figures |= {name: lengths[name] for name in ("completions/mean_length", "completions/clipped_ratio")}
    return {f"eval/{name}": value for name, value in figures.items()}
