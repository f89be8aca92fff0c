"""What the loops of CS336's assignment share: sampling, validation, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.data.encoding import completion_text
from grpo_fast.distributed.rng import own_generators
from grpo_fast.errors import UserError
from grpo_fast.evaluation.estimates import estimate
from grpo_fast.integrations.cs336_functions import (
    RewardFunction,
    encode,
    get_response_log_probs,
    tokenize_prompt_and_output,
)
from grpo_fast.integrations.cs336_record import Measured
from grpo_fast.rollout import Sampling, TransformersRollout

# Rows that a validation scores at once.
SCORED_ROWS = 8


@dataclass(frozen=True)
class Sampler:
    """Samples texts from a policy. The fields are arguments of the loops."""

    policy: nn.Module
    tokenizer: Any
    sampling_temperature: float
    sampling_min_tokens: int
    sampling_max_tokens: int
    stop: str | None
    max_tokens_per_generation_batch: int

    def __call__(self, prompts: list[str], count: int) -> list[str]:
        """`count` responses to each prompt, next to each other."""
        rollout = TransformersRollout(base_model(self.policy), self.tokenizer, self.max_tokens_per_generation_batch)
        generation_kwargs: dict[str, Any] = {"min_new_tokens": min(self.sampling_min_tokens, self.sampling_max_tokens)}
        generation_kwargs |= {"stop": self.stop} if self.stop else {}
        sampling = Sampling(
            count, self.sampling_max_tokens, self.sampling_temperature, generation_kwargs=generation_kwargs
        )
        prompt_ids = [encode(self.tokenizer, prompt) for prompt in prompts]
        with mode(self.policy, training=False):
            return [
                completion_text(self.tokenizer, each.token_ids, each.ended, each.past or 0)
                for each in rollout.generate(prompt_ids, sampling)
            ]


@contextmanager
def mode(policy: nn.Module, training: bool) -> Iterator[None]:
    """Within it, the policy trains (with dropout, where it has that) or does not."""
    before = policy.training
    policy.train(training)
    try:
        yield
    finally:
        policy.train(before)


def base_model(policy: nn.Module) -> nn.Module:
    """The causal LM inside a PeftModel, or the policy itself."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def log_generations(
    policy: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    ground_truths: list[str],
    reward_fn: RewardFunction,
    *,
    sampling_temperature: float = 1.0,
    sampling_min_tokens: int = 4,
    sampling_max_tokens: int = 1024,
    stop: str | None = "</answer>",
    max_tokens_per_generation_batch: int = 65536,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A response to each prompt with what the assignment asks to log about it, and the metrics over all of them.

    Sampling has its own random generators, seeded with `seed`, so it does not change what a training loop samples.

    Args:
        policy, tokenizer, prompts, ground_truths, reward_fn, stop: as in `grpo_train_loop`.

    Returns:
        For each prompt: ``prompt``, ``response``, ``ground_truth``, what `reward_fn` returns, ``response_tokens`` and
        ``token_entropy`` (the mean over the response, nats). The metrics: the means of these numbers with the prefix
        ``mean_``; ``reward_low`` and ``reward_high``, the 95% interval of the mean reward (NaN where it cannot be
        estimated); and ``mean_response_tokens_correct`` and ``_incorrect``, by whether the reward is at least 1.

    Raises:
        UserError: there are no prompts, or the numbers of prompts and ground truths differ.
    """
    check_pairs(prompts, ground_truths, "ground truths")
    settings = (sampling_temperature, sampling_min_tokens, sampling_max_tokens, stop, max_tokens_per_generation_batch)
    with own_generators(seed):
        responses = Sampler(policy, tokenizer, *settings)(prompts, 1)
    samples = []
    with torch.no_grad(), mode(policy, training=False):
        for first in range(0, len(prompts), SCORED_ROWS):
            rows = slice(first, first + SCORED_ROWS)
            batch = make_batch(prompts[rows], responses[rows], tokenizer, policy)
            counts = batch["response_mask"].sum(1)
            entropies = torch.zeros(len(counts))
            if counts.any():
                scored = get_response_log_probs(base_model(policy), **batch, return_token_entropy=True)
                entropies = scored["token_entropy"].sum(1) / counts.clamp(min=1)
            for row, (count, entropy) in enumerate(zip(counts.tolist(), entropies.tolist(), strict=True), first):
                sample = {"prompt": prompts[row], "response": responses[row], "ground_truth": ground_truths[row]}
                sample |= {name: float(x) for name, x in reward_fn(responses[row], ground_truths[row]).items()}
                samples.append(sample | {"response_tokens": count, "token_entropy": entropy})
    names = [name for name, value in samples[0].items() if isinstance(value, (int, float))]
    names = [name for name in names if name != "ground_truth"]
    metrics = {f"mean_{name}": sum(sample[name] for sample in samples) / len(samples) for name in names}
    interval = estimate(torch.tensor([sample["reward"] for sample in samples], dtype=torch.float64), seed)
    metrics |= {"reward_low": interval.low, "reward_high": interval.high}
    for name, correct in (("correct", True), ("incorrect", False)):
        lengths = [sample["response_tokens"] for sample in samples if (sample["reward"] >= 1) == correct]
        if lengths:
            metrics[f"mean_response_tokens_{name}"] = sum(lengths) / len(lengths)
    return samples, metrics


def make_batch(prompts: list[str], responses: list[str], tokenizer: Any, policy: nn.Module) -> dict[str, Tensor]:
    """What `tokenize_prompt_and_output` returns, on the policy's device."""
    batch = tokenize_prompt_and_output(prompts, responses, tokenizer)
    return {name: value.to(base_model(policy).device) for name, value in batch.items()}


def check_pairs(prompts: list[str], others: list[str], what: str) -> None:
    """Raise UserError if there are no prompts, or not as many of the others."""
    if len(prompts) != len(others):
        raise UserError(f"there are {len(prompts)} prompts, but {len(others)} {what}")
    if not prompts:
        raise UserError("there are no prompts")


def check_divides(**sizes: tuple[int, str, int]) -> None:
    """Raise UserError for a size that does not divide another, whose name and value follow it."""
    for name, (part, of, whole) in sizes.items():
        if part < 1 or whole % part:
            raise UserError(f"{name}={part} is not allowed: it must divide {of}={whole}")


def make_validation(
    sampler: Sampler,
    prompts: list[str] | None,
    ground_truths: list[str] | None,
    reward_fn: RewardFunction | None,
    seed: int,
) -> Callable[[], Measured] | None:
    """What measures the policy on the validation set; None without one."""
    if prompts is None and ground_truths is None:
        return None
    for name, value in (("val_prompts", prompts), ("val_ground_truths", ground_truths), ("reward_fn", reward_fn)):
        if value is None:
            raise UserError(f"a validation needs {name}")
    check_pairs(prompts, ground_truths, "ground truths for validation")
    settings = {name: value for name, value in vars(sampler).items() if name not in ("policy", "tokenizer")}

    def measure() -> Measured:
        arguments = (sampler.policy, sampler.tokenizer, prompts, ground_truths, reward_fn)
        samples, metrics = log_generations(*arguments, **settings, seed=seed)
        return metrics, samples

    return measure


def make_optimizer(policy: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """The assignment's optimizer of the parameters that are trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95))


def take_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """An optimizer step; returns the norm of the gradient before it is clipped."""
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def means(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the optimizer steps."""
    return {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
