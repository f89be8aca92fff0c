"""Proof that a sampler's weights are the trainer's: both score the same few tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout.base import Rollout, Sampling

# Largest difference by the dtype of the trainer's weights. A stale prefix or head is off by 1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_16_BIT = 0.3
# Tokens of the probe: several of an engine's prefix blocks (16 to 128 tokens), so that stale ones are seen.
PROMPT_TOKENS, SAMPLED_TOKENS = 520, 8


def tolerance(config: GRPOConfig, dtype: torch.dtype) -> float:
    """The run's own, or what the trainer's precision allows: under autocast its scores are bfloat16's."""
    exact = TOLERANCE_16_BIT if config.bf16 else TOLERANCE.get(dtype, TOLERANCE_16_BIT)
    return config.sync_tolerance or exact


class Probe:
    """A fixed prompt, whose continuation is sampled after every sync and scored by the trainer.

    The engine's own account of what it drew is compared, not its score of a given text: some engines compute the
    latter without the prefix cache, and a stale prefix would go unseen.

    Args:
        prompt_ids: any prompt; it is repeated to the probe's length.
        longest: positions of the longest sequence that the run may sample, which the probe does not exceed.
        temperature: the run's; no filters are applied.
        tolerance: largest absolute difference of a token's log-probability, nats.
    """

    def __init__(self, prompt_ids: list[int], longest: int, temperature: float, tolerance: float):
        length = max(1, min(PROMPT_TOKENS, longest - SAMPLED_TOKENS))
        self.prompt_ids = (prompt_ids * -(-length // len(prompt_ids)))[:length]
        self.sampling = Sampling(1, min(SAMPLED_TOKENS, max(1, longest - length)), temperature=temperature, seed=0)
        self.tolerance = tolerance

    def check(self, rollout: Rollout, score: Callable[[list[int], list[int]], Tensor]) -> float:
        """The largest difference.

        Args:
            rollout: the engine.
            score: the trainer's log-probabilities of a completion, given the ids of its prompt and its own.

        Raises:
            UserError: it is above the tolerance.
        """
        (response,) = rollout.generate([self.prompt_ids], self.sampling)
        sampled = torch.tensor(response.logprobs)
        scored = score(self.prompt_ids, response.token_ids).float().cpu()
        difference = (sampled - scored).abs().max().item()
        if not difference <= self.tolerance:
            raise UserError(
                "the sampler does not have the trainer's weights: after a sync, log-probabilities of a probe differ by "
                f"up to {difference:.3g} (allowed: {self.tolerance:g}, see sync_tolerance); sampler "
                f"{_listed(sampled)}, trainer {_listed(scored)}"
            )
        return difference


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist())
