"""Which of a policy's own completions it learns from, in rejection sampling and its online forms."""

from __future__ import annotations

import torch
from torch import Tensor

# The reward from which a completion counts as right: that of an accuracy reward, and the default of ``grpo-fast eval``.
RIGHT = 1.0


def right_ones(rewards: Tensor, threshold: float = RIGHT) -> Tensor:
    """Whether each reward is at least `threshold`; one that is NaN is not. Any shape, bool."""
    return rewards >= threshold


def best_ones(rewards: Tensor) -> Tensor:
    """The completion of the highest reward of each group, the first of several. ``[P, G]``, bool.

    A group without any reward (NaN) has none.
    """
    known = rewards.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    first = torch.zeros_like(rewards, dtype=torch.bool).scatter(1, known.argmax(1, keepdim=True), True)
    return first & ~rewards.isnan()
