"""Process rewards: a reward for every step of an answer (DeepSeekMath, arXiv 2402.03300, section 4.1.3).

A reward function may return for each completion, instead of a number, a list with a pair for every step:

    [(end, reward), ...]

`end` is the number of characters of the completion's text up to the end of the step: the ends rise, and the last one is
at most ``len(text)``. An empty list, or None, is a completion without steps. All steps' rewards of a group are
normalised together, and the advantage of a token is the sum of the normalised rewards of the steps that end at or
after it.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast.advantages import LARGEST, Advantages, group_advantages
from grpo_fast.data.encoding import completion_text
from grpo_fast.errors import UserError

Steps = list[tuple[int, float]]


def read_steps(name: str, value: object, index: int, text: str) -> Steps | float:
    """What function `name` returned for the steps of completion `index`, whose text is `text`; NaN for None.

    Raises:
        UserError: it is no list of pairs, an end is not a rising whole number within the text, or a reward not finite.
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
        if not abs(reward) <= LARGEST:
            raise UserError(f"{place}: the reward in {pair!r:.80} must be a number within +-{LARGEST:.1e}")
        lowest = steps[-1][0] + 1 if steps else 1
        if not lowest <= end <= len(text):
            raise UserError(
                f"{place}: the end in {pair!r:.80} must be from {lowest} to {len(text)}, in the completion's characters"
            )
        steps.append((end, reward))
    return steps


def mean_reward(steps: Steps) -> float:
    """A completion's process rewards in one number; NaN without steps."""
    return sum(reward for _, reward in steps) / len(steps) if steps else math.nan


def step_tokens(tokenizer: Any, token_ids: list[int], ends: Sequence[int], ended: bool) -> list[int]:
    """How many tokens belong to a step or to one before it, for each of the steps' `ends` (characters, rising).

    A token across the end of a step belongs to that step. So does one without characters of its own right after the
    end: one that completes a character, or the one that `ended` the completion.
    """

    def characters(index: int) -> int:
        return len(completion_text(tokenizer, token_ids[: index + 1], ended and index + 1 == len(token_ids)))

    counts, first = [], 0
    for end in ends:
        first = bisect_left(range(len(token_ids)), end, lo=first, key=characters)
        after = bisect_right(range(len(token_ids)), end, lo=first, key=characters)
        counts.append(min(max(first + 1, after), len(token_ids)))
    return counts


def normalise_steps(steps: list[Steps], num_generations: int, scale_rewards: str, baseline: str) -> Advantages:
    """Normalised rewards of the steps of B completions, those of a prompt side by side; all of a prompt are one group.

    Args:
        steps: each completion's steps, none where it has none.
        num_generations: G, which divides B.
        scale_rewards, baseline: see :func:`grpo_fast.advantages.group_advantages`.

    Returns:
        ``[B, M]`` float64 values for at most M steps, 0 where there is none, and ``[B]`` whether all steps of a
        completion's group have the same reward.
    """
    longest = max(1, *map(len, steps))
    rewards = torch.full((len(steps), longest), math.nan, dtype=torch.float64)
    for line, pairs in zip(rewards, steps, strict=True):
        line[: len(pairs)] = torch.tensor([reward for _, reward in pairs], dtype=torch.float64)
    found = group_advantages(rewards.flatten(), num_generations * longest, scale_rewards, baseline)
    return Advantages(found.values.view(-1, longest), found.equal.view(-1, longest)[:, 0])


def spread_steps(advantages: Tensor, counts: list[int], values: Sequence[float]) -> None:
    """Add to a completion's token `advantages` ``[T]`` each step's value, on the `step_tokens` up to the step's end."""
    for count, value in zip(counts, values, strict=False):
        advantages[:count] += value
