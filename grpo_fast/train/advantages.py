"""Advantages from rewards, normalised within the group of a prompt's completions."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grpo_fast.config import UNCENTRED, GRPOConfig
from grpo_fast.data.encoding import completion_text
from grpo_fast.errors import UserError
from grpo_fast.rewards.engine import Rewards, Steps
from grpo_fast.train.estimators import SETTINGS, estimate_advantages

Deviation = Literal["sample", "population"]


class Advantages(NamedTuple):
    """Advantages ``[B]`` of completions, and whether all rewards of each one's group are equal ``[B]``."""

    values: Tensor
    equal: Tensor


def nanstd(values: Tensor, dim: int = 0, deviation: Deviation = "sample") -> Tensor:
    """Standard deviation along `dim`, which is kept, without NaN; 0 of fewer than two numbers.

    Of a ``"sample"``, it has Bessel's correction (torch's default); that of a ``"population"`` (NumPy's) has not.
    """
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    divisor = (count - int(deviation == "sample")).clamp(min=1)
    return torch.where(count > 1, squares / divisor, 0.0).sqrt()


def _scaled(values: Tensor, spread: Tensor, eps: float) -> Tensor:
    """``values / (spread + eps)``; without any spread and `eps`, 0."""
    return torch.where(spread + eps > 0, values / (spread + eps), 0.0).masked_fill(values.isnan(), torch.nan)


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
    deviation: Deviation = "sample",
) -> Advantages:
    """``(r - baseline of the group) / (std + eps)``, as in TRL (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    Computed in float64, since the square of a reward of 1e20 overflows float32.

    Args:
        rewards: ``[B]`` float, the completions of a prompt in a row; NaN for a completion without a reward, which
            counts in no mean and gets advantage 0.
        num_generations: G, which divides B and is at least 2.
        scale_rewards: standard deviation to divide by: of the ``"group"``, of the ``"batch"``, of the batch's rewards
            once they are centred in their groups (``"whiten"``, as in REINFORCE++ with a baseline, arXiv 2501.03262),
            or ``"none"`` (Dr. GRPO, arXiv 2503.20783).
        baseline: one of `BASELINES`, see there.
        eps: added to the standard deviation.
        deviation: see `nanstd`.

    Returns:
        :class:`Advantages` in the dtype of `rewards`. A group of equal rewards has advantages of exactly 0, except
        with the baselines ``"none"`` and ``"best_only"``.

    Raises:
        ValueError: G does not divide B or is below 2, a reward is infinite, or `scale_rewards` or `baseline` is
            unknown.
    """
    if num_generations < 2 or rewards.numel() % num_generations:
        raise ValueError(f"num_generations={num_generations} must be at least 2 and divide {rewards.numel()} rewards")
    if bool(rewards.isinf().any()):
        raise ValueError("rewards must be finite")
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} is unknown; choose one of {', '.join(BASELINES)}")
    groups = rewards.double().view(-1, num_generations)
    equal = _highest(groups) <= groups.nan_to_num(nan=math.inf).amin(1, keepdim=True)
    # The mean of equal numbers may differ from them by rounding, which the division would amplify.
    nothing = groups.isnan() | (equal if baseline not in UNCENTRED else False)
    values = BASELINES[baseline](groups).masked_fill(nothing, 0.0)
    if scale_rewards == "group":
        values = _scaled(values, nanstd(groups, 1, deviation), eps)
    elif scale_rewards == "batch":
        values = _scaled(values, nanstd(groups.flatten(), 0, deviation), eps)
    elif scale_rewards == "whiten":
        # Their mean is 0 in every group already.
        values = _scaled(values, nanstd(values.masked_fill(groups.isnan(), torch.nan).flatten(), 0, deviation), eps)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; choose 'group', 'batch', 'whiten' or 'none'")
    return Advantages(values.flatten().to(rewards.dtype), equal.expand_as(groups).flatten())


def batch_advantages(
    rewards: Tensor, scaled: bool = True, eps: float = 1e-4, deviation: Deviation = "sample"
) -> Tensor:
    """``r - mean of the batch``, if `scaled` over ``std of the batch + eps``; 0 for NaN. ``[B]``, in float64."""
    values = rewards.double()
    centred = values - values.nanmean()
    return (_scaled(centred, nanstd(values, 0, deviation), eps) if scaled else centred).nan_to_num(nan=0.0)


def without_incomplete(rewards: Rewards, num_generations: int) -> Rewards:
    """`rewards`, of which groups with a completion that has no reward have none at all."""
    incomplete = incomplete_groups(rewards.total, num_generations)
    nothing = incomplete.nonzero().squeeze(1).tolist()
    steps = list(rewards.steps)
    for index in nothing:
        steps[index] = {}
    total = rewards.total.masked_fill(incomplete, torch.nan)
    return rewards._replace(total=total, each=rewards.each.masked_fill(incomplete[:, None], torch.nan), steps=steps)


def incomplete_groups(total: Tensor, num_generations: int) -> Tensor:
    """Whether some completion of each one's group has no reward, ``[B]`` bool, from the rewards ``[B]``."""
    return total.view(-1, num_generations).isnan().any(1).repeat_interleave(num_generations)


def apart_advantages(
    each: Tensor, weights: Tensor, num_generations: int, eps: float = 1e-4, deviation: Deviation = "sample"
) -> Advantages:
    """Normalise each of several rewards in its group, then their sum over the batch, as in TRL.

    GDPO, arXiv 2601.05242; TRL's `multi_objective_aggregation="normalize_then_sum"`. A reward of small spread keeps its
    influence beside a reward of large spread.

    Args:
        each: ``[B, F]`` float, the rewards from F functions, NaN where a function gave none.
        weights: ``[F]``, their weights in the sum.
        num_generations: G, which divides B and is at least 2.
        eps: added to both standard deviations.
        deviation: see `nanstd`.

    Returns:
        :class:`Advantages` in the dtype of `each`; a group is equal where every function's rewards are.
    """
    options = {"eps": eps, "deviation": deviation}
    apart = [group_advantages(column.double().contiguous(), num_generations, **options) for column in each.T]
    total = (torch.stack([found.values for found in apart], 1) * weights).sum(1)
    total = total.masked_fill(each.isnan().all(1), torch.nan)
    equal = torch.stack([found.equal for found in apart]).all(0)
    values = _scaled(total - total.nanmean(), nanstd(total, 0, deviation), eps)
    return Advantages(values.masked_fill(equal | total.isnan(), 0.0).to(each.dtype), equal)


def _centred(groups: Tensor) -> Tensor:
    return groups - groups.nanmean(1, keepdim=True)


def _leave_one_out(groups: Tensor) -> Tensor:
    count = (~groups.isnan()).sum(1, keepdim=True)
    return _centred(groups) * count / (count - 1).clamp(min=1)


def _highest(groups: Tensor) -> Tensor:
    return groups.nan_to_num(nan=-math.inf).amax(1, keepdim=True)


# From the rewards ``[P, G]`` of P groups:
#   mean           r - mean of the group
#   leave_one_out  r - mean of the others, which is G / (G - 1) times the former (RLOO, arXiv 2402.14740)
#   max            r - highest of the group
#   none           r itself
#   best_only      r if it is the group's highest, else 0 (the "max rewards" of Stanford's CS336, lecture 17)
BASELINES = {
    "mean": _centred,
    "leave_one_out": _leave_one_out,
    "max": lambda groups: groups - _highest(groups),
    "none": lambda groups: groups,
    "best_only": lambda groups: groups.where(groups == _highest(groups), 0.0),
}


def step_tokens(tokenizer: Any, token_ids: list[int], ends: Sequence[int], ended: bool) -> list[int]:
    """For each step's end (in characters, rising), how many tokens belong to that step or to an earlier one.

    A token across the end of a step belongs to that step. So does a token right after the end that has no characters:
    one that completes a character, or the one that `ended` the completion.
    """

    def characters(index: int) -> int:
        return len(completion_text(tokenizer, token_ids[: index + 1], ended and index + 1 == len(token_ids)))

    counts, first = [], 0
    for end in ends:
        first = bisect_left(range(len(token_ids)), end, lo=first, key=characters)
        after = bisect_right(range(len(token_ids)), end, lo=first, key=characters)
        counts.append(min(max(first + 1, after), len(token_ids)))
    return counts


def normalise_steps(
    steps: list[Steps], num_generations: int, scale_rewards: str, baseline: str, **options: Any
) -> Advantages:
    """Normalised rewards of the steps of B completions; all steps of a prompt's completions form one group.

    Each completion has any number of steps; the completions of a prompt are in a row. `num_generations`,
    `scale_rewards`, `baseline` and `options` are those of `group_advantages`. The values are ``[B, M]`` float64 for at
    most M steps, 0 where there is no step; ``[B]`` says whether all steps of a completion's group have the same reward.
    """
    longest = max(1, *map(len, steps))
    rewards = torch.full((len(steps), longest), math.nan, dtype=torch.float64)
    for line, pairs in zip(rewards, steps, strict=True):
        line[: len(pairs)] = torch.tensor([reward for _, reward in pairs], dtype=torch.float64)
    found = group_advantages(rewards.flatten(), num_generations * longest, scale_rewards, baseline, **options)
    return Advantages(found.values.view(-1, longest), found.equal.view(-1, longest)[:, 0])


@dataclass
class RewardAdvantages:
    """Advantages of completions ``[B]`` and of their steps by reward function, and whether all of a group are 0."""

    outcome: Tensor
    equal: Tensor
    steps: dict[int, Tensor] = field(default_factory=dict)


def reward_advantages(
    rewards: Rewards, weights: Tensor, config: GRPOConfig, penalty: Tensor | None = None,
    lengths: Tensor | None = None, greedy: Tensor | None = None,
) -> RewardAdvantages:  # fmt: skip
    """Advantages of completions and steps, before they are spread over the tokens.

    The functions that rewarded whole completions make up the outcome; the steps that a function rewarded are normalised
    separately. With ``incomplete_groups="drop"``, a group with a completion that has no reward has no advantages.

    Args:
        rewards: of B completions, those of a prompt in a row.
        weights: ``[F]``, the functions' weights.
        penalty: ``[B]``, subtracted from the outcome's reward.
        lengths: ``[B]``, tokens of the completions, for `advantage_estimator`; None for whether groups are equal alone.
        greedy: ``[P]``, rewards of the prompts' greedy completions, for an estimator that takes them.
    """
    size, scale, baseline = config.num_generations, config.scale_rewards, config.reward_baseline
    if config.incomplete_groups == "drop":
        rewards = without_incomplete(rewards, size)
    options = {"eps": config.advantage_eps, "deviation": config.advantage_std}
    process = sorted({index for found in rewards.steps for index in found})
    each = rewards.each.clone()
    # A completion whose steps were rewarded counts as rewarded.
    nothing = each[:, process].isnan() | (len(process) < each.shape[1])
    each[:, process] = torch.zeros_like(each[:, process]).masked_fill(nothing, torch.nan)
    if config.multi_objective_aggregation == "normalize_then_sum":
        outcome = apart_advantages(each, weights, size, **options)
    else:
        total = (each.nan_to_num(nan=0.0) * weights).sum(1).masked_fill(each.isnan().all(1), torch.nan)
        total = total if penalty is None else total - penalty
        outcome = group_advantages(total, size, scale, baseline, **options)
        if config.relative_weight != 1 or config.baseline_weight:
            apart = batch_advantages(total, scale != "none", **options)
            mixed = config.relative_weight * outcome.values + config.baseline_weight * apart
            outcome = outcome._replace(values=mixed.to(total.dtype))
        if config.advantage_estimator is not None and lengths is not None:
            if process:
                raise UserError(
                    "advantage_estimator takes the rewards of completions, and a reward function gave steps"
                )
            grid = total.view(-1, size), lengths.view(-1, size)
            settings = {name: getattr(config, name) for name in SETTINGS}
            values = estimate_advantages(config.advantage_estimator, *grid, greedy, **settings)
            outcome = outcome._replace(values=values.flatten().to(total.dtype))
    made, equal = {}, outcome.equal
    for index in process:
        found: Advantages = normalise_steps(
            [steps.get(index, []) for steps in rewards.steps], size, scale, baseline, **options
        )
        made[index], equal = weights[index] * found.values, equal & found.equal
    return RewardAdvantages(outcome.values, equal, made)
