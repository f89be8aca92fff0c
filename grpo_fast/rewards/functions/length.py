"""Length rewards, in tokens, which take arguments: ``kimi_length(math_answer)``, ``soft_overlong(4096, 819)``."""

from __future__ import annotations

from collections import defaultdict

from grpo_fast.errors import UserError
from grpo_fast.rewards.base import RewardFunction


def kimi_length(judge: str) -> RewardFunction:
    """Reward short completions if they are right; punish long ones, also if they are wrong.

    With the lengths in the group, ``x = 0.5 - (length - min) / (max - min)``, or 0 if all are equal. The reward is x
    for a right completion and ``min(0, x)`` for a wrong one (Kimi k1.5, arXiv 2501.12599, section 2.3.3).

    Args:
        judge: the run's reward function that tells what is right, by a value of 1 or more. If it returns None, so does
            this function.
    """

    def length_reward(prompts, completions, completion_ids, correct, groups, **columns) -> list[float | None]:
        lengths = defaultdict(list)
        for group, ids in zip(groups, completion_ids, strict=True):
            lengths[group].append(len(ids))
        rewards: list[float | None] = []
        for group, ids, right in zip(groups, completion_ids, correct, strict=True):
            shortest, spread = min(lengths[group]), max(lengths[group]) - min(lengths[group])
            x = 0.5 - (len(ids) - shortest) / spread if spread else 0.0
            rewards.append(None if right is None else x if right else min(0.0, x))
        return rewards

    length_reward.judge = judge
    return length_reward


def soft_overlong(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """A penalty that grows from 0 to -1 over the last `soft_punish_cache` tokens before `max_completion_len`.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), with the arguments of TRL's
    ``get_soft_overlong_punishment``.
    """
    if not 0 < soft_punish_cache <= max_completion_len:
        raise UserError(
            f"soft_overlong({max_completion_len}, {soft_punish_cache}) is not allowed: the second number, the tokens "
            "over which the penalty grows, must be from 1 to the first, the longest completion"
        )

    def overlong_reward(prompts, completions, completion_ids, **columns) -> list[float]:
        left = [max_completion_len - soft_punish_cache - len(ids) for ids in completion_ids]
        return [min(max(tokens / soft_punish_cache, -1.0), 0.0) for tokens in left]

    return overlong_reward
