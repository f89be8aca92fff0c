"""What the updates of one generation batch need: sampled groups, their advantages and flat token tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_fast.advantages import Advantages, apart_advantages, group_advantages
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.packing import Sample, token_offsets
from grpo_fast.process_rewards import normalise_steps, spread_steps, step_tokens
from grpo_fast.rewards import Rewards
from grpo_fast.rollout import Response
from grpo_kernels import PolicyObjective, token_weights


@dataclass
class StepBatch:
    """Everything of one generation that the updates need. Token tensors are flat ``[N]`` over all completions.

    `counted` says of each completion whether it is in the loss at all; `active` lists the samples that are computed;
    `drawn` is how many prompts were drawn for them; `high_entropy` marks the tokens that keep their advantage;
    `sampling_logprobs` are the sampler's own, where the loss corrects for their difference by `correction`.
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

    def to(self, device: torch.device) -> StepBatch:
        """The token tensors on the device of the microbatches; the plan of rows stays on the CPU."""
        return dataclasses.replace(self, advantages=self.advantages.to(device), weights=self.weights.to(device))

    def set_advantages(self, advantages: Tensor, objective: PolicyObjective) -> None:
        """Give every token its advantage ``[N]``, and leave out the samples that cannot move the policy."""
        self.advantages = advantages.to(self.weights.device)
        moves = self.counted
        if objective.advantage_alone:
            moves = moves & (self.sums((advantages != 0).float()) > 0)
        self.active = moves.nonzero().squeeze(1).tolist()

    def sums(self, values: Tensor) -> Tensor:
        """Sums ``[S]`` over each completion's tokens."""
        samples = torch.arange(len(self.samples)).repeat_interleave(self.offsets.diff()).to(values.device)
        return values.new_zeros(len(self.samples)).index_add(0, samples, values)


def build_step_batch(
    samples: list[Sample], counted: Tensor, objective: PolicyObjective, config: GRPOConfig
) -> StepBatch:
    """Flat token tensors of a step, with one set of weights for all its microbatches and no advantages yet.

    `counted` is ``[S]``, whether a completion is in the loss at all. Active is what has to be scored: all completions
    where the KL is part of their reward, else those in the loss.
    """
    offsets = token_offsets(samples)
    weights = token_weights(
        counted.repeat_interleave(offsets.diff()), objective.aggregation, cu_seqlens=offsets,
        constant_length=config.max_completion_length,
    )  # fmt: skip
    scored = torch.ones_like(counted) if config.kl_in_reward else counted
    return StepBatch(
        samples, offsets, counted, torch.zeros_like(weights), weights, scored.nonzero().squeeze(1).tolist()
    )


@dataclass
class Groups:
    """P prompts and their completions, G of each prompt side by side."""

    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    responses: list[Response]
    texts: list[str]
    rewards: Rewards

    def samples(self) -> list[Sample]:
        size = len(self.responses) // len(self.prompts)
        return [
            Sample(self.prompts[index // size], response.token_ids, index // size)
            for index, response in enumerate(self.responses)
        ]

    def counted(self, config: GRPOConfig) -> Tensor:
        """Whether each completion is in the loss ``[B]``."""
        ended = torch.tensor([response.finish_reason == "stop" for response in self.responses])
        return ended | (not config.mask_truncated_completions)

    def lines(self, step: int, names: list[str], batch: StepBatch) -> Iterator[dict[str, Any]]:
        """For the log: every completion with its rewards and the advantage of its first token."""
        firsts = batch.advantages[batch.offsets[:-1].to(batch.advantages.device)].tolist()
        size = len(self.responses) // len(self.prompts)
        for index, (text, advantage) in enumerate(zip(self.texts, firsts, strict=True)):
            rewards = dict(zip(names, self.rewards.each[index].tolist(), strict=True))
            group = index // size
            entry = {"step": step, "group": group, "prompt": self.rows[group]["prompt"], "completion": text}
            yield {**entry, "rewards": rewards, "advantage": advantage}

    def replaced(self, places: list[int], others: Groups) -> Groups:
        """These groups, but at `places` those of `others`."""
        size = len(self.responses) // len(self.prompts)
        inside = [place * size + index for place in places for index in range(size)]
        rewards = {"steps": _put(self.rewards.steps, inside, others.rewards.steps)}
        for name in ("total", "each", "errors"):
            rewards[name] = getattr(self.rewards, name).clone()
            rewards[name][inside] = getattr(others.rewards, name)
        return Groups(
            _put(self.rows, places, others.rows),
            _put(self.prompts, places, others.prompts),
            _put(self.responses, inside, others.responses),
            _put(self.texts, inside, others.texts),
            self.rewards._replace(**rewards),
        )


def _put(items: list, places: list[int], others: list) -> list:
    items = list(items)
    for place, other in zip(places, others, strict=True):
        items[place] = other
    return items


@dataclass
class RewardAdvantages:
    """Advantages of completions ``[B]``, those of their steps by reward function, and whether a group has none."""

    outcome: Tensor
    equal: Tensor
    steps: dict[int, Tensor] = field(default_factory=dict)


def reward_advantages(
    rewards: Rewards, weights: Tensor, config: GRPOConfig, penalty: Tensor | None = None
) -> RewardAdvantages:
    """Advantages as `config` says, before they are spread over the tokens.

    Functions that rewarded whole completions make up the outcome; those that rewarded steps are normalised each by
    itself.

    Args:
        rewards: of B completions, those of a prompt side by side.
        weights: ``[F]``, the functions' weights.
        config: how rewards are normalised.
        penalty: ``[B]``, taken from the outcome's reward.
    """
    size, scale, baseline = config.num_generations, config.scale_rewards, config.reward_baseline
    process = sorted({index for found in rewards.steps for index in found})
    each = rewards.each.clone()
    # A completion whose steps were rewarded is not without a reward.
    nothing = each[:, process].isnan() | (len(process) < each.shape[1])
    each[:, process] = torch.zeros_like(each[:, process]).masked_fill(nothing, torch.nan)
    if config.multi_objective_aggregation == "normalize_then_sum":
        outcome = apart_advantages(each, weights, size)
    else:
        total = (each.nan_to_num(nan=0.0) * weights).sum(1).masked_fill(each.isnan().all(1), torch.nan)
        outcome = group_advantages(total if penalty is None else total - penalty, size, scale, baseline)
    made, equal = {}, outcome.equal
    for index in process:
        found: Advantages = normalise_steps([steps.get(index, []) for steps in rewards.steps], size, scale, baseline)
        made[index], equal = weights[index] * found.values, equal & found.equal
    return RewardAdvantages(outcome.values, equal, made)


def token_advantages(groups: Groups, advantages: RewardAdvantages, tokenizer: Any) -> Tensor:
    """The advantage of every token ``[N]`` float32: the outcome's, and those of the steps that end at or after it.

    Raises:
        UserError: one is beyond float32.
    """
    tokens = []
    for place, (response, steps) in enumerate(zip(groups.responses, groups.rewards.steps, strict=True)):
        values = torch.full((len(response.token_ids),), advantages.outcome[place].item(), dtype=torch.float64)
        for index, pairs in steps.items():
            ends, ended = [end for end, _ in pairs], response.finish_reason == "stop"
            counts = step_tokens(tokenizer, response.token_ids, ends, ended)
            spread_steps(values, counts, advantages.steps[index][place].tolist())
        tokens.append(values)
    advantage = torch.cat(tokens).float()
    if not bool(advantage.isfinite().all()):
        raise UserError(
            "an advantage is beyond the numbers of float32; set smaller reward_weights, or scale_rewards: group"
        )
    return advantage


def sample_groups(
    sample: Callable[[int], Groups], weights: Tensor, config: GRPOConfig
) -> tuple[Groups, int, dict[str, float]]:
    """The groups of a step; with `dynamic_sampling`, others in place of those without variance.

    As in DAPO (arXiv 2503.14476, section 3.2): a prompt whose completions all have the same reward teaches nothing.
    Just as many prompts as such groups are sampled anew, until there is none or `max_num_gen_batches` batches were
    sampled; groups without variance that are left then stay, so that a batch always has its full size.

    Args:
        sample: samples and scores so many further prompts.
        weights: ``[F]``, weights of the reward functions.
        config: the run.

    Returns:
        The groups, the number of prompts that were drawn, and the figures of the refilling: batches that were sampled,
        the share of groups that were refilled, and the mean reward of everything that was sampled, which, other than
        that of the batch, does not depend on what was kept.
    """
    groups = sample(config.prompts_per_step)
    if not config.dynamic_sampling:
        return groups, config.prompts_per_step, {}
    drawn, batches, sampled = config.prompts_per_step, 1, [groups.rewards.total]
    equal = first = without_variance(groups.rewards, weights, config)
    while equal and batches < config.max_num_gen_batches:
        groups = groups.replaced(equal, others := sample(len(equal)))
        drawn, batches = drawn + len(equal), batches + 1
        sampled.append(others.rewards.total)
        equal = without_variance(groups.rewards, weights, config)
    return groups, drawn, {
        "dynamic_sampling/num_gen_batches": batches,
        "dynamic_sampling/refilled_share": len(first) / config.prompts_per_step if batches > 1 else 0.0,
        "dynamic_sampling/sampled_reward": torch.cat(sampled).nanmean().item(),
    }  # fmt: skip


def without_variance(rewards: Rewards, weights: Tensor, config: GRPOConfig) -> list[int]:
    """Places of the groups whose rewards are all equal."""
    equal = reward_advantages(rewards, weights, config).equal
    return equal[:: config.num_generations].nonzero().squeeze(1).tolist()
