"""Rewards for the steps of a completion, as reward functions return them. Does not import torch."""

from __future__ import annotations

import math
import operator

from grpo_fast.config import LARGEST_REWARD
from grpo_fast.errors import UserError

Steps = list[tuple[int, float]]


def read_steps(name: str, value: object, index: int, text: str) -> Steps | float:
    """Check what function `name` returned for the steps of completion `index`, whose text is `text`; NaN for None.

    Raises:
        UserError: `value` is not a list of pairs, the ends do not rise within the text, or a reward is not finite.
    """
    if value is None:
        return math.nan
    place = f"reward function {name!r}, completion {index}"
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{place}: {value!r:.80} beside lists of steps; every completion needs a list, or None")
    steps: Steps = []
    for pair in value:
        try:
            end, reward = pair
            end, reward = operator.index(end), float(reward)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{place}: {pair!r:.80} must be a pair of a step's end and its reward") from None
        if not abs(reward) <= LARGEST_REWARD:
            raise UserError(f"{place}: the reward in {pair!r:.80} must be a number within +-{LARGEST_REWARD:.1e}")
        lowest = steps[-1][0] + 1 if steps else 1
        if not lowest <= end <= len(text):
            raise UserError(
                f"{place}: the end in {pair!r:.80} must be from {lowest} to {len(text)}, in the completion's characters"
            )
        steps.append((end, reward))
    return steps


def mean_reward(steps: Steps | float) -> float:
    """A completion's reward itself, or the mean over its steps; NaN without steps."""
    if not isinstance(steps, list):
        return steps
    return sum(reward for _, reward in steps) / len(steps) if steps else math.nan
