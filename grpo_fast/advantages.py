"""Advantages from rewards, normalised within the group of a prompt's completions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4
# Of a reward, a weight and an advantage: the largest number of float32, in which the loss takes advantages. In float64
# the squares of their products are finite, too.
LARGEST = torch.finfo(torch.float32).max


class Advantages(NamedTuple):
    """Per-completion advantages ``[B]``, and whether all rewards of a completion's group are equal ``[B]``."""

    values: Tensor
    equal: Tensor


def nanstd(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Standard deviation (Bessel's correction) of the entries that are not NaN; 0 where there are fewer than two."""
    values = values.flatten() if dim is None else values
    dim = 0 if dim is None else dim
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    std = torch.where(count > 1, squares / (count - 1).clamp(min=1), 0.0).sqrt()
    return std if keepdim else std.squeeze(dim)


def group_advantages(
    rewards: Tensor, num_generations: int, scale_rewards: str = "group", baseline: str = "mean"
) -> Advantages:
    """``(r - baseline of the group) / (std + 1e-4)``, as in TRL (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    Computed in float64: the square of a reward of 1e20 is no number of float32.

    Args:
        rewards: ``[B]`` float, the completions of a prompt side by side; NaN for a completion without a reward, which
            counts in no mean and gets advantage 0.
        num_generations: G, which divides B and is at least 2.
        scale_rewards: standard deviation to divide by (with Bessel's correction): of the ``"group"``, of the
            ``"batch"``, or ``"none"`` (Dr. GRPO, arXiv 2503.20783).
        baseline: one of `BASELINES`, see there.

    Returns:
        :class:`Advantages` in the dtype of `rewards`. A group of equal rewards has advantages of exactly 0, but with
        the baselines ``"none"`` and ``"best_only"``.

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
    equal = _equal(groups)
    # The mean of equal numbers may differ from them by rounding, which the division would blow up.
    nothing = groups.isnan() | (equal if baseline not in UNCENTRED else False)
    values = BASELINES[baseline](groups).masked_fill(nothing, 0.0)
    if scale_rewards == "group":
        values = values / (nanstd(groups, 1, keepdim=True) + EPSILON)
    elif scale_rewards == "batch":
        values = values / (nanstd(groups) + EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; choose 'group', 'batch' or 'none'")
    return Advantages(values.flatten().to(rewards.dtype), equal.expand_as(groups).flatten())


def apart_advantages(each: Tensor, weights: Tensor, num_generations: int) -> Advantages:
    """Several rewards, each normalised in its group, then summed and normalised over the batch, as in TRL.

    GDPO, arXiv 2601.05242; TRL's `multi_objective_aggregation="normalize_then_sum"`. A reward of small spread keeps its
    voice beside one of large spread.

    Args:
        each: ``[B, F]`` float, the rewards of F functions, NaN where one has none.
        weights: ``[F]``, their weights in the sum.
        num_generations: G, which divides B and is at least 2.

    Returns:
        :class:`Advantages` in the dtype of `each`; a group is equal where every function's rewards are.
    """
    apart = [group_advantages(column.double().contiguous(), num_generations) for column in each.T]
    total = (torch.stack([found.values for found in apart], 1) * weights).sum(1)
    total = total.masked_fill(each.isnan().all(1), torch.nan)
    equal = torch.stack([found.equal for found in apart]).all(0)
    values = (total - total.nanmean()) / (nanstd(total) + EPSILON)
    return Advantages(values.masked_fill(equal | total.isnan(), 0.0).to(each.dtype), equal)


def _equal(groups: Tensor) -> Tensor:
    lowest = groups.nan_to_num(nan=float("inf")).amin(1, keepdim=True)
    return _highest(groups) <= lowest


def _centred(groups: Tensor) -> Tensor:
    return groups - groups.nanmean(1, keepdim=True)


def _leave_one_out(groups: Tensor) -> Tensor:
    count = (~groups.isnan()).sum(1, keepdim=True)
    return _centred(groups) * count / (count - 1).clamp(min=1)


def _highest(groups: Tensor) -> Tensor:
    return groups.nan_to_num(nan=-float("inf")).amax(1, keepdim=True)


# What is left of the rewards ``[P, G]`` of P groups:
#   mean           r - mean of the group
#   leave_one_out  r - mean of the others, G / (G - 1) times the former (RLOO, arXiv 2402.14740)
#   max            r - highest of the group
#   none           r itself
#   best_only      r where it is the group's highest, else 0 (the "max rewards" of Stanford's CS336, lecture 17)
BASELINES = {
    "mean": _centred,
    "leave_one_out": _leave_one_out,
    "max": lambda groups: groups - _highest(groups),
    "none": lambda groups: groups,
    "best_only": lambda groups: groups.where(groups == _highest(groups), 0.0),
}
# Those that leave something even where all rewards of a group are equal.
UNCENTRED = ("none", "best_only")
