"""The completions of a step, their weights and advantages, in the order of training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_fast.model.packing import Sample, token_offsets
from grpo_kernels import PolicyObjective, Support, token_weights


@dataclass
class StepBatch:
    """What the updates on one generation batch need. Token tensors are flat ``[N]`` over all completions.

    `counted` is ``[S]``, whether a completion is in the loss at all; `active` lists the samples that are computed;
    `drawn` is how many prompts were drawn for them; `high_entropy` marks the tokens that keep their advantage;
    `sampling_logprobs` are the sampler's, whose difference from the trainer's `correction` accounts for; `mask` is 0
    for the tokens that were forced instead of sampled (None: there are none), which `weights` leaves out as well;
    `selected` marks the tokens that the objective treats differently;
    `support` holds the ids that the sampler kept for each token, on the CPU, over which all policies are scored (None:
    the whole vocabulary).
    """

    samples: list[Sample]
    offsets: Tensor
    counted: Tensor
    advantages: Tensor
    weights: Tensor
    active: list[int]
    drawn: int = 0
    ref_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    high_entropy: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    correction: Tensor | None = None
    mask: Tensor | None = None
    selected: Tensor | None = None
    support: Support | None = None

    def set_advantages(self, advantages: Tensor, objective: PolicyObjective) -> None:
        """Set the advantage of every token ``[N]``, and leave out the samples that cannot move the policy."""
        self.advantages = advantages.to(self.weights.device)
        moves = self.counted
        if objective.advantage_alone:
            moves = moves & (self.sums((advantages != 0).float()) > 0)
        self.active = moves.nonzero().squeeze(1).tolist()

    def split(self, parts: int, objective: PolicyObjective, config: GRPOConfig) -> list[StepBatch]:
        """Batches of equal numbers of the completions, drawn at random; each has the weights of a step of its own."""
        order = torch.randperm(len(self.samples))
        return [self._part(chosen.sort().values, objective, config) for chosen in order.chunk(parts)]

    def _part(self, chosen: Tensor, objective: PolicyObjective, config: GRPOConfig) -> StepBatch:
        samples = [self.samples[index] for index in chosen.tolist()]
        starts, ends = self.offsets[:-1][chosen].tolist(), self.offsets[1:][chosen].tolist()
        device = self.weights.device
        tokens = torch.cat([torch.arange(*bounds) for bounds in zip(starts, ends, strict=True)]).to(device)
        mask = None if self.mask is None else self.mask[tokens.to(self.mask.device)]
        part = build_step_batch(samples, self.counted[chosen], objective, config, mask)
        part.weights = part.weights.to(device)
        for name in ("ref_logprobs", "old_logprobs", "sampling_logprobs", "correction"):
            values = getattr(self, name)
            setattr(part, name, None if values is None else values[tokens])
        part.support = None if self.support is None else self.support.take(tokens.cpu())
        part.set_advantages(self.advantages[tokens].cpu(), objective)
        return part

    def sums(self, values: Tensor) -> Tensor:
        """Sums ``[S]`` over each completion's sampled tokens."""
        values = values if self.mask is None else values * self.mask.to(values)
        samples = torch.arange(len(self.samples)).repeat_interleave(self.offsets.diff()).to(values.device)
        return values.new_zeros(len(self.samples)).index_add(0, samples, values)


def build_step_batch(
    samples: list[Sample], counted: Tensor, objective: PolicyObjective, config: GRPOConfig,
    mask: Tensor | None = None, num_sequences: int | None = None,
) -> StepBatch:  # fmt: skip
    """Flat token tensors of a step, with one set of weights for all its microbatches and no advantages yet.

    `counted` is ``[S]``, whether a completion is in the loss at all; `mask` is ``[N]``, 0 where a token was forced
    (None: all were sampled). The active completions are those to be scored: all of them with the KL in their reward,
    otherwise those in the loss. A mean over sequences is one over `num_sequences` (default: all samples).
    """
    offsets = token_offsets(samples)
    tokens = counted.repeat_interleave(offsets.diff())
    weights = token_weights(
        tokens if mask is None else tokens & (mask != 0), objective.aggregation, cu_seqlens=offsets,
        num_sequences=num_sequences, constant_length=config.max_completion_length,
    )  # fmt: skip
    scored = torch.ones_like(counted) if config.kl_in_reward else counted
    return StepBatch(
        samples, offsets, counted, torch.zeros_like(weights), weights, scored.nonzero().squeeze(1).tolist(), mask=mask
    )
