"""A check that the sampler has the trainer's weights: their log-probabilities of a few tokens are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout.base import Rollout, Sampling
from grpo_kernels import Support

# The trainer's log-probabilities ``[n]`` of a completion, given the ids of its prompt, its own, and its support if it
# was sampled with one.
Score = Callable[[list[int], list[int], Support | None], Tensor]

# Largest allowed difference, by the dtype of the trainer's weights. A stale prefix or head is off by 1 or more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_16_BIT = 0.3
# The prompt covers several blocks of an engine's prefix cache (16 to 128 tokens), so that stale blocks are detected.
PROMPT_TOKENS, SAMPLED_TOKENS = 520, 8


def tolerance(config: GRPOConfig, dtype: torch.dtype) -> float:
    """`sync_tolerance`, or a default for the trainer's precision, which is bfloat16 under autocast."""
    default = TOLERANCE_16_BIT if config.bf16 else TOLERANCE.get(dtype, TOLERANCE_16_BIT)
    return config.sync_tolerance or default


class Probe:
    """A fixed prompt whose continuation is sampled after every sync and scored by the trainer.

    The comparison uses the log-probabilities that the engine returns while it samples. Its scores of a given text would
    not do: some engines compute those without the prefix cache, which would hide a stale prefix.

    Args:
        prompt_ids: any prompt; it is repeated to the probe's length.
        longest: length in tokens of the run's longest sequence, which the probe does not exceed.
        temperature: the run's.
        tolerance: largest allowed absolute difference of a token's log-probability, in nats.
        truncated: the run's sampling, whose filters are applied, if responses say which tokens they kept. Otherwise no
            filters are: with them the engine's log-probabilities would be of other distributions than the trainer's.
    """

    def __init__(
        self, prompt_ids: list[int], longest: int, temperature: float, tolerance: float,
        truncated: Sampling | None = None,
    ):  # fmt: skip
        length = max(1, min(PROMPT_TOKENS, longest - SAMPLED_TOKENS))
        self.prompt_ids = (prompt_ids * -(-length // len(prompt_ids)))[:length]
        count = min(SAMPLED_TOKENS, max(1, longest - length))
        self.sampling = Sampling(1, count, temperature=temperature, seed=0)
        if truncated is not None:
            self.sampling = replace(truncated.one_token(), max_completion_length=count, seed=0, thinking_budget=None)
        self.tolerance = tolerance

    def check(self, rollout: Rollout, score: Score) -> float:
        """Sample from `rollout` and return the largest difference, in nats.

        Args:
            score: see `Score`.

        Raises:
            UserError: the difference is above the tolerance.
        """
        (response,) = rollout.generate([self.prompt_ids], self.sampling)
        sampled = torch.tensor(response.logprobs)
        scored = score(self.prompt_ids, response.token_ids, response.support).float().cpu()
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
