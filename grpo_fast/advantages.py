"""Advantages from rewards, normalised within the group of a prompt's completions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4


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


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Advantages:
    """``(r - mean of the group) / (std + 1e-4)``, as in TRL (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: ``[B]`` float, the completions of a prompt side by side; NaN for a completion without a reward, which
            counts in no mean and gets advantage 0.
        num_generations: G, which divides B and is at least 2.
        scale_rewards: standard deviation to divide by (with Bessel's correction): of the ``"group"``, of the
            ``"batch"``, or ``"none"`` (Dr. GRPO, arXiv 2503.20783).

    Returns:
        :class:`Advantages`. A group of equal rewards has advantages of exactly 0.

    Raises:
        ValueError: G does not divide B or is below 2, a reward is infinite, or `scale_rewards` is unknown.
    """
    if num_generations < 2 or rewards.numel() % num_generations:
        raise ValueError(f"num_generations={num_generations} must be at least 2 and divide {rewards.numel()} rewards")
    if bool(rewards.isinf().any()):
        raise ValueError("rewards must be finite")
    groups = rewards.view(-1, num_generations)
    # The mean of equal numbers may differ from them by rounding, which the division would blow up.
    highest = groups.nan_to_num(nan=-float("inf")).amax(1, keepdim=True)
    lowest = groups.nan_to_num(nan=float("inf")).amin(1, keepdim=True)
    equal = highest <= lowest
    centred = (groups - groups.nanmean(1, keepdim=True)).masked_fill(equal | groups.isnan(), 0.0)
    if scale_rewards == "group":
        centred = centred / (nanstd(groups, 1, keepdim=True) + EPSILON)
    elif scale_rewards == "batch":
        centred = centred / (nanstd(rewards) + EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; choose 'group', 'batch' or 'none'")
    return Advantages(centred.flatten(), equal.expand_as(groups).flatten())
