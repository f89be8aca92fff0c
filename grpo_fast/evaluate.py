"""Completions of prompts with their rewards, and the figures of a policy on held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from grpo_fast.checkpoint import rng_state, set_rng_state
from grpo_fast.data import Row, as_scored, completion_text, rendered_prompt
from grpo_fast.distributed import on_main
from grpo_fast.metrics import completion_metrics
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
    return score_responses(rewards, tokenizer, rows, prompt_ids, rollout.generate(prompt_ids, sampling))


def score_responses(
    rewards: RewardModel, tokenizer: Any, rows: list[Row], prompt_ids: list[list[int]], responses: list[Response]
) -> tuple[list[Response], list[str], Rewards]:
    """The same for responses that are there, those of a row side by side."""
    ids = [list(response.token_ids) for response in responses]
    texts = [completion_text(tokenizer, r.token_ids, r.finish_reason == "stop") for r in responses]
    size = len(responses) // len(rows)
    repeated = [row for row in rows for _ in range(size)]
    rendered = [rendered_prompt(tokenizer, i, row["prompt"]) for i, row in zip(prompt_ids, rows, strict=True)]
    turns = [as_scored(row["prompt"], text) for row, text in zip(repeated, texts, strict=True)]
    prompts, completions = map(list, zip(*turns, strict=True))
    columns = {name: [row.get(name) for row in repeated] for name in repeated[0] if name != "prompt"}
    columns |= {"completion_ids": ids, "rendered_prompts": [text for text in rendered for _ in range(size)]}
    # Once, wherever there are several processes: a reward function may count, or cost.
    return responses, texts, on_main(lambda: rewards(prompts, completions, columns, size))


@contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Random numbers by `seed` within it; after it, all generators are where they were."""
    kept = rng_state()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        yield
    finally:
        set_rng_state(kept)


def evaluate(
    rollout: Rollout,
    rewards: RewardModel,
    tokenizer: Any,
    rows: list[Row],
    prompt_ids: list[list[int]],
    sampling: Sampling,
    seed: int,
) -> dict[str, float]:
    """Means over completions of `rows`, sampled by a seed of their own: of every reward function, and lengths.

    The names are those of training's metrics after ``eval/``, as in ``eval/rewards/exact_answer/mean``.
    """
    with own_generators(seed):
        responses, _, scored = sample_and_score(rollout, rewards, tokenizer, rows, prompt_ids, sampling)
    figures = {f"rewards/{name}/mean": scored.each[:, i].nanmean().item() for i, name in enumerate(rewards.names)}
    lengths = completion_metrics(responses)
    figures |= {name: lengths[name] for name in ("completions/mean_length", "completions/clipped_ratio")}
    return {f"eval/{name}": value for name, value in figures.items()}
