"""Advantages from rewards, normalised within the group of a prompt's completions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4


class Advantages(NamedTuple):
    """Per-completion advantages ``[B]``, the standard deviation of each completion's group ``[B]``, and whether all
    rewards of its group are equal ``[B]``."""

    values: Tensor
    group_std: Tensor
    equal: Tensor


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Advantages:
    """``(r - mean of the group) / (std + 1e-4)``, as in TRL (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: ``[B]`` float, the completions of a prompt side by side.
        num_generations: G, which divides B and is at least 2.
        scale_rewards: standard deviation to divide by (with Bessel's correction): of the ``"group"``, of the
            ``"batch"``, or ``"none"`` (Dr. GRPO, arXiv 2503.20783).

    Returns:
        :class:`Advantages`. A group of equal rewards has advantages of exactly 0.

    Raises:
        ValueError: G does not divide B or is below 2, rewards are not finite, or `scale_rewards` is unknown.
    """
    if num_generations < 2 or rewards.numel() % num_generations:
        raise ValueError(f"num_generations={num_generations} must be at least 2 and divide {rewards.numel()} rewards")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards must be finite")
    groups = rewards.view(-1, num_generations)
    std = groups.std(1, keepdim=True)
    # The mean of equal numbers may differ from them by rounding, which the division would blow up.
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    centred = (groups - groups.mean(1, keepdim=True)).masked_fill(equal, 0.0)
    if scale_rewards == "group":
        centred = centred / (std + EPSILON)
    elif scale_rewards == "batch":
        centred = centred / (rewards.std() + EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; choose 'group', 'batch' or 'none'")
    return Advantages(centred.flatten(), std.expand_as(groups).flatten(), equal.expand_as(groups).flatten())
